// The binding of select_tokens: checks every argument, then launches on the scores' device.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "bindings.h"
#include "check.h"
#include "select_tokens.h"
#include "tensor_view.h"
#ifdef ADAPTIVE_CUDA
#include "cuda/device.h"
#endif

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxCapacity = int64_t{1} << 30;  // positions are int32, with room to count on

void set_lengths(const Check& check, const TensorView& lengths, SelectTokensArgs& args) {
  check.dtype(lengths, "lengths", {DType::kInt32});
  check.size(lengths, "lengths", 0, args.batch);
  check.last_contiguous(lengths, "lengths");
  args.lengths = lengths.data<int32_t>();
  if (lengths.tensor.device.type != dlpack::kCpu) return;  // the CUDA kernel looks for itself
  for (int64_t row = 0; row < args.batch; ++row) {
    if (args.lengths[row] < 0 || args.lengths[row] > args.capacity) {
      check.fail(PyExc_IndexError, ("lengths[" + std::to_string(row) + "]").c_str(),
                 "be in 0.." + std::to_string(args.capacity), std::to_string(args.lengths[row]));
    }
  }
}

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
  if (lengths.given()) {
    check.tensor(lengths, "lengths", 1);
    check.same_device(lengths, "lengths", scores);
    set_lengths(check, lengths, args);
  }
  args.scores = scores.data<float>();
  args.scores_stride[0] = scores.stride(0);
  args.scores_stride[1] = scores.stride(1);
  return args;
}

void check_output(const Check& check, const TensorView& view, const char* name, int rank,
                  const TensorView& scores, int64_t width) {
  check.tensor(view, name, rank);
  check.dtype(view, name, {DType::kInt32});
  check.same_device(view, name, scores);
  check.size(view, name, 0, scores.size(0));
  check.size(view, name, 1, scores.size(1));
  if (rank == 3) check.size(view, name, 2, width);
  check.contiguous(view, name);
}

#ifdef ADAPTIVE_CUDA
Stream stream_of(const TensorView& view) {
  void* stream = nullptr;
  const auto& device = view.tensor.device;
  if (view.api->current_stream(device.type, device.id, &stream) != 0) throw py::error_already_set();
  return static_cast<Stream>(stream);
}
#endif

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
                      [[maybe_unused]] const TensorView& workspace, const TensorView& scores,
                      int64_t budget, const TensorView& lengths, int64_t sinks, int64_t recent,
                      double mass) {
  const Check check("select_tokens");
  SelectTokensArgs args = select_tokens_args(check, scores, budget, lengths, sinks, recent, mass);
  check_output(check, indices, "indices", 3, scores, args.width);
  check_output(check, counts, "counts", 2, scores, args.width);
  args.indices = indices.data<int32_t>();
  args.counts = counts.data<int32_t>();
  if (counts.numel() == 0) return 0;

  if (scores.tensor.device.type == dlpack::kCpu) {
    count_call("select_tokens:cpu");
    int64_t refused = -1;
    {
      const py::gil_scoped_release release;
      refused = cpu::select_tokens(args);
    }
    if (refused >= 0) refuse_score(check, args, refused);
    return 0;
  }
#ifdef ADAPTIVE_CUDA
  if (scores.tensor.device.type == dlpack::kCuda) {
    const cuda::DeviceGuard guard(scores.tensor.device.id);
    const int64_t wanted = cuda::select_tokens_workspace_bytes(args);
    if (workspace.given()) {
      check.tensor(workspace, "workspace", 1);
      check.same_device(workspace, "workspace", scores);
      args.workspace = workspace.data<void>();
      args.workspace_bytes = workspace.numel() * workspace.tensor.dtype.bits / 8;
    }
    if (args.workspace_bytes < wanted) return wanted;
    const Stream stream = stream_of(scores);
    count_call("select_tokens:cuda");
    const py::gil_scoped_release release;
    cuda::select_tokens(args, stream);
    return 0;
  }
#endif
  check.fail(PyExc_NotImplementedError, "scores", "be on a device that this build has kernels for",
             std::string(py::str(scores.object.attr("device"))));
}

}  // namespace

void bind_select_tokens(py::module_& m) {
  m.def("select_tokens", &select_tokens, py::arg("indices"), py::arg("counts"),
        py::arg("workspace"), py::arg("scores"), py::arg("budget"), py::arg("lengths") = py::none(),
        py::arg("sinks") = 0, py::arg("recent") = 0, py::arg("mass") = 1.0);
}

}  // namespace adaptive
