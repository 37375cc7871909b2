// The Python module adaptive._native. Each op binds itself in bind_<op>.cpp; here is what belongs
// to no op: call counters, instruction-set levels, huge pages.

#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cpu/huge_pages.h"
#include "cpu/level.h"
#include "tensor_view.h"

namespace adaptive {
namespace {

namespace py = pybind11;

std::map<std::string, int64_t>& calls() {
  static std::map<std::string, int64_t> counters;
  return counters;
}

constexpr const char* kLevels[] = {"baseline", "avx2", "avx512", "avx512_bf16"};  // by cpu::Level

const char* level_name(cpu::Level level) { return kLevels[static_cast<int>(level)]; }

void set_cpu_level(const std::string& name) {
  for (int level = 0; level < 4; ++level) {
    if (name == kLevels[level]) return cpu::set_level(static_cast<cpu::Level>(level));
  }
  throw std::invalid_argument(
      "adaptive: the CPU level must be baseline, avx2, avx512 or avx512_bf16, got " + name);
}

void advise_huge_pages(const TensorView& tensor) {
  const Check check("advise_huge_pages");
  check.tensor(tensor, "tensor", -1);
  if (tensor.tensor.device.type != dlpack::kCpu || tensor.numel() == 0) return;
  int64_t last = 0;  // offset of the last element: a strided view covers the span up to it
  for (int axis = 0; axis < tensor.tensor.ndim; ++axis) {
    last += (tensor.size(axis) - 1) * tensor.stride(axis);
  }
  cpu::advise_huge_pages(tensor.data<void>(), (last + 1) * tensor.tensor.dtype.bits / 8);
}

}  // namespace

void count_call(const char* kernel) { ++calls()[kernel]; }

}  // namespace adaptive

PYBIND11_MODULE(_native, m) {
  namespace py = pybind11;
  using namespace adaptive;  // NOLINT: one function, one module
  m.doc() = "Native kernels of adaptive. Called through adaptive.ops, which documents them.";
#ifdef ADAPTIVE_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("tensor"));
  m.def("best_cpu_level", [] { return level_name(cpu::best_level()); });
  m.def("calls", [] { return calls(); });
  m.def("cpu_level", [] { return level_name(cpu::level()); });
  m.def("set_cpu_level", &set_cpu_level, py::arg("level"));
  bind_block_sparse_attention(m);
  bind_combine_tokens(m);
  bind_decode_attention(m);
  bind_exit_confidence(m);
  bind_gather_attention(m);
  bind_gather_tokens(m);
  bind_local_attention(m);
  bind_merge_tokens(m);
  bind_pool_blocks(m);
  bind_prefix_row_ffn(m);
  bind_route_tokens(m);
  bind_router_scores(m);
  bind_score_tokens(m);
  bind_select_tokens(m);
  bind_skinny_linear(m);
  bind_sparse_row_ffn(m);
  bind_tree_attention(m);
  bind_verify_draft(m);
  bind_verify_samples(m);
}
