// The binding of router_scores: checks every argument, then launches on the device of hidden.

#include <pybind11/pybind11.h>

#include <string>

#include "bind_attention.h"
#include "bind_tokens.h"
#include "router_scores.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kRouterWidthStep = 8, kMaxRouterWidth = int64_t{1} << 30;

/// Checks the router's rows, which the function decides about.
void set_router(const Check& check, const TensorView& weight, py::handle choice,
                const TensorView& hidden, RouterScoresArgs& args) {
  const std::string function =
      PyUnicode_Check(choice.ptr()) ? py::cast<std::string>(choice) : Check::text(choice);
  if (function != "sigmoid" && function != "softmax" && function != "identity") {
    check.fail(PyExc_ValueError, "function", "be sigmoid, softmax or identity", function);
  }
  args.routes = function == "softmax" ? 2 : 1;
  args.sigmoid = function != "identity";
  check_rows(check, weight, "weight", args.dtype, {args.routes, args.width}, hidden);
  args.weight = weight.data<void>();
  args.weight_stride = weight.stride(0);
}

int64_t router_scores(const TensorView& scores, const TensorView& workspace,
                      const TensorView& hidden, const TensorView& weight,
                      const TensorView& norm_weight, py::handle eps, py::handle function) {
  const Check check("router_scores");
  RouterScoresArgs args{};
  args.dtype = check_hidden(check, hidden);
  args.batch = hidden.size(0);
  args.tokens = hidden.size(1);
  args.width = hidden.size(2);
  if (args.width < 1 || args.width > kMaxRouterWidth || args.width % kRouterWidthStep != 0) {
    check.fail(PyExc_ValueError, "hidden", "have a width that is a multiple of 8",
               check.shape(hidden));
  }
  args.hidden = hidden.data<void>();
  for (int axis = 0; axis < 2; ++axis) args.hidden_stride[axis] = hidden.stride(axis);
  set_router(check, weight, function, hidden, args);
  if (norm_weight.given()) {
    check_rows(check, norm_weight, "norm_weight", args.dtype, {args.width}, hidden);
    args.norm_weight = norm_weight.data<void>();
  }
  args.eps = check.number(eps, "eps");
  if (args.eps < 0) check.fail(PyExc_ValueError, "eps", "be at least 0", check.text(eps));
  args.scores = contiguous_rows<float>(check, scores, "scores", DType::kFloat32,
                                       {args.batch, args.tokens}, hidden);
  if (scores.numel() == 0) return 0;
  return launch(
      check, "router_scores", hidden, "hidden", workspace, [&] { cpu::router_scores(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::router_scores(args, stream); });
}

}  // namespace

void bind_router_scores(py::module_& m) {
  m.def("router_scores", &router_scores, py::arg("scores"), py::arg("workspace"), py::arg("hidden"),
        py::arg("weight"), py::arg("norm_weight") = py::none(), py::arg("eps") = 1e-6,
        py::arg("function") = "sigmoid");
}

}  // namespace adaptive
