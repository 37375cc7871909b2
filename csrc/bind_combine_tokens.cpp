// The binding of combine_tokens: checks every argument, then launches on the device of hidden.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "bind_tokens.h"
#include "combine_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

int64_t combine_tokens(const TensorView& out, const TensorView& workspace, const TensorView& hidden,
                       const TensorView& update, const TensorView& tokens,
                       const TensorView& weights) {
  const Check check("combine_tokens");
  CombineTokensArgs args{};
  set_listed(check, args, hidden, tokens);
  check_rows(check, update, "update", args.dtype, {args.batch, args.chosen, args.width}, hidden);
  check_rows(check, out, "out", args.dtype, {args.batch, args.tokens, args.width}, hidden);
  args.update = update.data<void>();
  args.out = out.data<void>();
  for (int axis = 0; axis < 2; ++axis) {
    args.update_stride[axis] = update.stride(axis);
    args.out_stride[axis] = out.stride(axis);
    if (args.in_place() && out.stride(axis) != hidden.stride(axis) && out.size(axis) > 1) {
      check.fail(PyExc_ValueError, "out", "be hidden itself or other memory",
                 "another view of hidden");
    }
  }
  if (weights.given()) {
    check_rows(check, weights, "weights", DType::kFloat32, {args.batch, args.chosen}, hidden);
    args.weights = weights.data<float>();
    args.weights_stride = weights.stride(0);
  }
  if (hidden.numel() == 0) return 0;
  return launch(
      check, "combine_tokens", hidden, "hidden", workspace, [&] { cpu::combine_tokens(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::combine_tokens(args, stream); });
}

}  // namespace

void bind_combine_tokens(py::module_& m) {
  m.def("combine_tokens", &combine_tokens, py::arg("out"), py::arg("workspace"), py::arg("hidden"),
        py::arg("update"), py::arg("tokens"), py::arg("weights") = py::none());
}

}  // namespace adaptive
