// The binding of route_tokens: checks every argument, then launches on the scores' device.

#include <pybind11/pybind11.h>

#include <cmath>
#include <string>

#include "bind_attention.h"
#include "bind_verify.h"
#include "route_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxRouted = int64_t{1} << 30;  // positions are int32, with room to count on

float routing_threshold(const Check& check, py::handle threshold) {
  const double value = PyFloat_AsDouble(threshold.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    check.fail(PyExc_TypeError, "threshold", "be a number", Check::text(threshold));
  }
  if (std::isnan(value)) {
    check.fail(PyExc_ValueError, "threshold", "not be NaN", Check::text(threshold));
  }
  return static_cast<float>(value);
}

/// A whole number of tokens, or the share of them that is to be routed.
void set_capacity(const Check& check, py::handle capacity, RouteTokensArgs& args) {
  if (PyFloat_Check(capacity.ptr())) {
    args.share = PyFloat_AS_DOUBLE(capacity.ptr());
    if (!(args.share > 0 && args.share <= 1)) {
      check.fail(PyExc_ValueError, "capacity",
                 "be a share above 0 and at most 1, or a whole number of tokens",
                 Check::text(capacity));
    }
    return;
  }
  args.capacity = check.integer(capacity, "capacity");
  if (args.capacity < 1) {
    check.fail(PyExc_ValueError, "capacity", "be at least 1 token, or a share above 0",
               Check::text(capacity));
  }
}

int64_t route_tokens(const TensorView& tokens, const TensorView& counts, const TensorView& slots,
                     const TensorView& workspace, const TensorView& scores, py::handle threshold,
                     py::handle capacity, const TensorView& valid) {
  const Check check("route_tokens");
  RouteTokensArgs args{};
  check.tensor(scores, "scores", 2);
  const int64_t batch = args.batch = scores.size(0), length = args.tokens = scores.size(1);
  check_rows(check, scores, "scores", DType::kFloat32, {batch, length}, scores);
  if (length > kMaxRouted) {
    check.fail(PyExc_ValueError, "scores", "have at most 1073741824 tokens", check.shape(scores));
  }
  if (threshold.is_none() == capacity.is_none()) {
    check.fail(PyExc_ValueError, "capacity", "be given, or threshold, and not both",
               threshold.is_none() ? "neither" : "both");
  }
  if (capacity.is_none()) {
    args.threshold = routing_threshold(check, threshold);
  } else {
    set_capacity(check, capacity, args);
  }
  args.scores = scores.data<float>();
  args.scores_stride = scores.stride(0);
  if (valid.given()) {
    check_rows(check, valid, "valid", DType::kBool, {batch, length}, scores);
    args.valid = valid.data<bool>();
    args.valid_stride = valid.stride(0);
  }
  constexpr DType kInt32 = DType::kInt32;
  args.list = contiguous_rows<int32_t>(check, tokens, "tokens", kInt32, {batch, length}, scores);
  args.counts = contiguous_rows<int32_t>(check, counts, "counts", kInt32, {batch}, scores);
  args.slots = contiguous_rows<int32_t>(check, slots, "slots", kInt32, {batch, length}, scores);
  if (batch == 0) return 0;
  int64_t refused = -1;
  const int64_t wanted = launch(
      check, "route_tokens", scores, "scores", workspace,
      [&] { refused = cpu::route_tokens(args); }, [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::route_tokens(args, stream); });
  if (refused >= 0) {
    const std::string at =
        std::to_string(refused / length) + ", " + std::to_string(refused % length);
    check.fail(PyExc_ValueError, ("scores[" + at + "]").c_str(), "not be NaN", "nan");
  }
  return wanted;
}

}  // namespace

void bind_route_tokens(py::module_& m) {
  m.def("route_tokens", &route_tokens, py::arg("tokens"), py::arg("counts"), py::arg("slots"),
        py::arg("workspace"), py::arg("scores"), py::arg("threshold") = py::none(),
        py::arg("capacity") = py::none(), py::arg("valid") = py::none());
}

}  // namespace adaptive
