// The binding of skinny_linear: checks every argument, then launches on the input's device.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "bind_linear.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxRows = 16, kMinFeatures = 32, kFeatureStep = 8, kMinGroup = 32;

/// Fills in how int8 weights are scaled; `args` knows the sizes of the layer.
void scale_weight(const Check& check, const TensorView& weight, const TensorView& scales,
                  SkinnyLinearArgs& args) {
  const char* name = "weight_scales";
  check.dtype(weight, "weight", {DType::kInt8});
  check.tensor(scales, name, 2);
  check.dtype(scales, name, {DType::kFloat32});
  check.same_device(scales, name, weight);
  check.size(scales, name, 0, args.out_features);
  const int64_t groups = scales.size(1);
  const int64_t group = groups > 0 ? args.in_features / groups : 0;
  if (group < kMinGroup || (group & (group - 1)) != 0 || group * groups != args.in_features) {
    check.fail(PyExc_ValueError, name,
               "have one column for each group of 32, 64 or another power of two of the " +
                   std::to_string(args.in_features) + " features",
               check.shape(scales));
  }
  check.last_contiguous(scales, name);
  args.weight_scales = scales.data<float>();
  args.scales_stride = scales.stride(0);
  args.group = group;
}

}  // namespace

SkinnyLinearArgs linear_args(const Check& check, const TensorView& input, const char* name,
                             const TensorView& weight, const TensorView& bias,
                             const TensorView& weight_scales) {
  check.tensor(input, name, 2);
  check.tensor(weight, "weight", 2);
  SkinnyLinearArgs args{};
  args.dtype = check.dtype(input, name, {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  args.rows = input.size(0);
  args.in_features = input.size(1);
  args.out_features = weight.size(0);
  if (args.rows > kMaxRows) {
    check.fail(PyExc_ValueError, name, "have at most 16 rows", check.shape(input));
  }
  if (args.in_features < kMinFeatures || args.in_features % kFeatureStep != 0) {
    check.fail(PyExc_ValueError, name, "have a multiple of 8 features, 32 or more",
               check.shape(input));
  }
  check.size(weight, "weight", 1, args.in_features);
  if (weight_scales.given()) {
    scale_weight(check, weight, weight_scales, args);
  } else {
    check.dtype(weight, "weight", {args.dtype});
  }
  check.same_device(weight, "weight", input);
  check.last_contiguous(input, name);
  check.last_contiguous(weight, "weight");
  args.input = input.data<void>();
  args.weight = weight.data<void>();
  args.input_stride = input.stride(0);
  args.weight_stride = weight.stride(0);
  if (bias.given()) {
    check.tensor(bias, "bias", 1);
    check.size(bias, "bias", 0, args.out_features);
    check.dtype(bias, "bias", {args.dtype});
    check.same_device(bias, "bias", input);
    check.contiguous(bias, "bias");
    args.bias = bias.data<void>();
  }
  return args;
}

namespace {

int64_t skinny_linear(const TensorView& out, const TensorView& workspace, const TensorView& input,
                      const TensorView& weight, const TensorView& bias,
                      const TensorView& weight_scales) {
  const Check check("skinny_linear");
  SkinnyLinearArgs args = linear_args(check, input, "input", weight, bias, weight_scales);
  check.tensor(out, "out", 2);
  check.size(out, "out", 0, args.rows);
  check.size(out, "out", 1, args.out_features);
  check.dtype(out, "out", {args.dtype});
  check.same_device(out, "out", input);
  check.contiguous(out, "out");
  args.out = out.data<void>();
  if (out.numel() == 0) return 0;
  return launch(
      check, "skinny_linear", input, "input", workspace, [&] { cpu::skinny_linear(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::skinny_linear(args, stream); });
}

}  // namespace

void bind_skinny_linear(py::module_& m) {
  m.def("skinny_linear", &skinny_linear, py::arg("out"), py::arg("workspace"), py::arg("input"),
        py::arg("weight"), py::arg("bias") = py::none(), py::arg("weight_scales") = py::none());
}

}  // namespace adaptive
