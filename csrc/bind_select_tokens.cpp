// The binding of select_tokens: checks every argument, then launches on the scores' device.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "bind_attention.h"
#include "select_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxCapacity = int64_t{1} << 30;  // positions are int32, with room to count on

SelectTokensArgs select_tokens_args(const Check& check, const TensorView& scores, int64_t budget,
                                    const TensorView& lengths, int64_t sinks, int64_t recent,
                                    double mass) {
  check.tensor(scores, "scores", 3);
  check.dtype(scores, "scores", {DType::kFloat32});
  check.last_contiguous(scores, "scores");
  SelectTokensArgs args{};
  args.batch = scores.size(0);
  args.kv_heads = scores.size(1);
  args.capacity = scores.size(2);
  if (args.capacity > kMaxCapacity) {
    check.fail(PyExc_ValueError, "scores", "have at most 1073741824 keys", check.shape(scores));
  }
  if (budget < 1) {
    check.fail(PyExc_ValueError, "budget", "be at least 1", std::to_string(budget));
  }
  if (sinks < 0) check.fail(PyExc_ValueError, "sinks", "be at least 0", std::to_string(sinks));
  if (recent < 0) check.fail(PyExc_ValueError, "recent", "be at least 0", std::to_string(recent));
  if (sinks > budget || recent > budget - sinks) {
    check.fail(
        PyExc_ValueError, "budget",
        "be at least sinks + recent = " + std::to_string(sinks) + " + " + std::to_string(recent),
        std::to_string(budget));
  }
  if (!(mass > 0 && mass <= 1)) {
    check.fail(PyExc_ValueError, "mass", "be above 0 and at most 1", std::to_string(mass));
  }
  args.width = args.budget = std::min(budget, args.capacity);  // more has no effect
  args.sinks = std::min(sinks, args.capacity);
  args.recent = std::min(recent, args.capacity);
  args.mass = mass;
  args.lengths = check_lengths(check, lengths, args.batch, args.capacity, scores);
  args.scores = scores.data<float>();
  args.scores_stride[0] = scores.stride(0);
  args.scores_stride[1] = scores.stride(1);
  return args;
}

void check_list_output(const Check& check, const TensorView& view, const char* name, int rank,
                       const TensorView& scores, int64_t width) {
  check.tensor(view, name, rank);
  check.dtype(view, name, {DType::kInt32});
  check.same_device(view, name, scores);
  check.size(view, name, 0, scores.size(0));
  check.size(view, name, 1, scores.size(1));
  if (rank == 3) check.size(view, name, 2, width);
  check.contiguous(view, name);
}

[[noreturn]] void refuse_score(const Check& check, const SelectTokensArgs& args, int64_t offset) {
  const int64_t position = offset % args.capacity, line = offset / args.capacity;
  const int64_t head = line % args.kv_heads, batch = line / args.kv_heads;
  const float score =
      args.scores[batch * args.scores_stride[0] + head * args.scores_stride[1] + position];
  const std::string at =
      std::to_string(batch) + ", " + std::to_string(head) + ", " + std::to_string(position);
  check.fail(
      PyExc_ValueError, ("scores[" + at + "]").c_str(),
      args.mass < 1 ? "be finite and not negative, or -inf, where mass is below 1" : "not be NaN",
      std::to_string(score));
}

// Fills `indices` and `counts` and returns 0; or returns the bytes of workspace that it must be
// called again with, which is what CUDA asks for.
int64_t select_tokens(const TensorView& indices, const TensorView& counts,
                      const TensorView& workspace, const TensorView& scores, int64_t budget,
                      const TensorView& lengths, int64_t sinks, int64_t recent, double mass) {
  const Check check("select_tokens");
  SelectTokensArgs args = select_tokens_args(check, scores, budget, lengths, sinks, recent, mass);
  check_list_output(check, indices, "indices", 3, scores, args.width);
  check_list_output(check, counts, "counts", 2, scores, args.width);
  args.indices = indices.data<int32_t>();
  args.counts = counts.data<int32_t>();
  if (counts.numel() == 0) return 0;

  int64_t refused = -1;
  const int64_t wanted = launch(
      check, "select_tokens", scores, "scores", workspace,
      [&] { refused = cpu::select_tokens(args); },
      [&] { return cuda::select_tokens_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.workspace = memory;
        args.workspace_bytes = bytes;
        cuda::select_tokens(args, stream);
      });
  if (refused >= 0) refuse_score(check, args, refused);
  return wanted;
}

}  // namespace

void bind_select_tokens(py::module_& m) {
  m.def("select_tokens", &select_tokens, py::arg("indices"), py::arg("counts"),
        py::arg("workspace"), py::arg("scores"), py::arg("budget"), py::arg("lengths") = py::none(),
        py::arg("sinks") = 0, py::arg("recent") = 0, py::arg("mass") = 1.0);
}

}  // namespace adaptive
