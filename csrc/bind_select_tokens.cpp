// The binding of select_tokens.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bind_attention.h"
#include "select_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

void set_options(const Check& check, SelectTokensArgs& args) {
  const std::pair<const char*, int64_t> counts[] = {{"sinks", args.sinks}, {"recent", args.recent}};
  for (const auto& [name, value] : counts) {
    if (value < 0) check.fail(PyExc_ValueError, name, "be at least 0", std::to_string(value));
  }
  const int64_t forced = args.sinks + args.recent;
  if (args.budget < std::max<int64_t>(1, forced)) {
    check.fail(PyExc_ValueError, "budget",
               "be at least 1 and at least sinks + recent, " + std::to_string(forced),
               std::to_string(args.budget));
  }
  if (!(args.mass > 0 && args.mass <= 1)) {
    check.fail(PyExc_ValueError, "mass", "be above 0 and at most 1", std::to_string(args.mass));
  }
}

// Says which score is wrong, if the kernel found one.
void refuse_wrong(const Check& check, const SelectTokensArgs& args) {
  const int64_t lists = args.batch * args.kv_heads;
  const int64_t list = std::find(args.counts, args.counts + lists, -1) - args.counts;
  if (list == lists) return;
  const int64_t row = list / args.kv_heads, head = list % args.kv_heads;
  const float* scores = args.scores + row * args.scores_stride[0] + head * args.scores_stride[1];
  const bool shares = args.mass < 1;
  for (int64_t i = 0; i < args.capacity; ++i) {
    const float score = scores[i];
    if (shares ? score >= 0 && !std::isinf(score) : !std::isnan(score)) continue;
    if (std::isinf(score) && score < 0) continue;
    check.fail(PyExc_ValueError,
               ("scores[" + std::to_string(row) + ", " + std::to_string(head) + ", " +
                std::to_string(i) + "]")
                   .c_str(),
               shares ? "be finite and not negative where mass is below 1" : "not be NaN",
               std::to_string(score));
  }
}

int64_t select_tokens(const TensorView& indices, const TensorView& counts,
                      const TensorView& workspace, const TensorView& scores, int64_t budget,
                      const TensorView& lengths, int64_t sinks, int64_t recent, double mass) {
  const Check check("select_tokens");
  check.tensor(scores, "scores", 3);
  check.dtype(scores, "scores", {DType::kFloat32});
  check.last_contiguous(scores, "scores");
  SelectTokensArgs args{};
  args.batch = scores.size(0);
  args.kv_heads = scores.size(1);
  args.capacity = scores.size(2);
  args.budget = budget;
  args.width = std::min(budget, args.capacity);
  args.sinks = sinks;
  args.recent = recent;
  args.mass = mass;
  set_options(check, args);
  args.lengths = check_lengths(check, lengths, args.batch, args.capacity, scores);
  args.scores = scores.data<float>();
  args.scores_stride[0] = scores.stride(0);
  args.scores_stride[1] = scores.stride(1);

  check.tensor(indices, "indices", 3);
  check.tensor(counts, "counts", 2);
  const int64_t sizes[3] = {args.batch, args.kv_heads, args.width};
  for (int axis = 0; axis < 3; ++axis) {
    check.size(indices, "indices", axis, sizes[axis]);
    if (axis < 2) check.size(counts, "counts", axis, sizes[axis]);
  }
  for (const auto& [view, name] : {std::pair{&indices, "indices"}, std::pair{&counts, "counts"}}) {
    check.dtype(*view, name, {DType::kInt32});
    check.same_device(*view, name, scores);
    check.contiguous(*view, name);
  }
  args.indices = indices.data<int32_t>();
  args.counts = counts.data<int32_t>();
  if (counts.numel() == 0) return 0;
  const int64_t wanted = launch(
      check, "select_tokens", scores, "scores", workspace, [&] { cpu::select_tokens(args); },
      [&] { return cuda::select_tokens_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.workspace = memory;
        args.workspace_bytes = bytes;
        cuda::select_tokens(args, stream);
      });
  if (scores.tensor.device.type == dlpack::kCpu) refuse_wrong(check, args);
  return wanted;
}

}  // namespace

void bind_select_tokens(py::module_& m) {
  m.def("select_tokens", &select_tokens, py::arg("indices"), py::arg("counts"),
        py::arg("workspace"), py::arg("scores"), py::arg("budget"), py::arg("lengths") = py::none(),
        py::arg("sinks") = 0, py::arg("recent") = 0, py::arg("mass") = 1.0);
}

}  // namespace adaptive
