// The binding of exit_confidence: checks every argument, then launches on hidden's device.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "bind_linear.h"
#include "exit_confidence.h"

namespace adaptive {
namespace {

namespace py = pybind11;

float* float_output(const Check& check, const TensorView& output, const char* name,
                    std::initializer_list<int64_t> sizes, const TensorView& like) {
  check_output(check, output, name, sizes, like);
  check.contiguous(output, name);
  return output.data<float>();
}

int64_t exit_confidence(const TensorView& tokens, const TensorView& top, const TensorView& lse,
                        const TensorView& entropy, const TensorView& workspace,
                        const TensorView& hidden, const TensorView& weight, const TensorView& bias,
                        py::handle scale, py::handle softcap, const TensorView& weight_scales) {
  const Check check("exit_confidence");
  ExitConfidenceArgs args{};
  args.linear = linear_args(check, hidden, "hidden", weight, bias, weight_scales);
  if (args.linear.out_features == 0) {
    check.fail(PyExc_ValueError, "weight", "have a row for each token of a vocabulary",
               check.shape(weight));
  }
  args.scale = check.number(scale, "scale");
  args.softcap = check_softcap(check, softcap);
  const int64_t rows = args.linear.rows;
  check.tensor(tokens, "tokens", 2);
  check.dtype(tokens, "tokens", {DType::kInt64});
  check.same_device(tokens, "tokens", hidden);
  check.size(tokens, "tokens", 0, rows);
  check.size(tokens, "tokens", 1, 2);
  check.contiguous(tokens, "tokens");
  args.tokens = tokens.data<int64_t>();
  args.top = float_output(check, top, "top", {rows, 2}, hidden);
  args.lse = float_output(check, lse, "lse", {rows}, hidden);
  args.entropy = float_output(check, entropy, "entropy", {rows}, hidden);
  if (rows == 0) return 0;
  return launch(
      check, "exit_confidence", hidden, "hidden", workspace, [&] { cpu::exit_confidence(args); },
      [&] { return cuda::exit_confidence_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.workspace = memory;
        args.workspace_bytes = bytes;
        cuda::exit_confidence(args, stream);
      });
}

}  // namespace

void bind_exit_confidence(py::module_& m) {
  m.def("exit_confidence", &exit_confidence, py::arg("tokens"), py::arg("top"), py::arg("lse"),
        py::arg("entropy"), py::arg("workspace"), py::arg("hidden"), py::arg("weight"),
        py::arg("bias") = py::none(), py::arg("scale") = 1.0, py::arg("softcap") = 0.0,
        py::arg("weight_scales") = py::none());
}

}  // namespace adaptive
