// The binding of prefix_row_ffn: checks every argument, then launches on the input's device.

#include <pybind11/pybind11.h>

#include <string>

#include "bind_attention.h"
#include "prefix_row_ffn.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMinPrefixFeatures = 32, kPrefixStep = 8;

Activation activation_of(const Check& check, py::handle choice) {
  const std::string name =
      PyUnicode_Check(choice.ptr()) ? py::cast<std::string>(choice) : Check::text(choice);
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  check.fail(PyExc_ValueError, "activation", "be silu, gelu_tanh or relu", name);
}

/// Checks a weight of `rows` rows of `columns`, and returns its data.
const void* prefix_weight(const Check& check, const TensorView& view, const char* name,
                          int64_t rows, int64_t columns, DType dtype, const TensorView& like) {
  check.tensor(view, name, 2);
  check.size(view, name, 0, rows);
  check.size(view, name, 1, columns);
  check.dtype(view, name, {dtype});
  check.same_device(view, name, like);
  check.last_contiguous(view, name);
  return view.data<void>();
}

/// Checks the widths: on the CPU each must be in range; a CUDA kernel looks for itself.
const int64_t* prefix_widths(const Check& check, const TensorView& widths,
                             const PrefixRowFfnArgs& args, const TensorView& like) {
  check.tensor(widths, "widths", 1);
  check.size(widths, "widths", 0, args.rows);
  check.dtype(widths, "widths", {DType::kInt64});
  check.same_device(widths, "widths", like);
  check.contiguous(widths, "widths");
  const auto* list = widths.data<const int64_t>();
  if (widths.tensor.device.type != dlpack::kCpu) return list;
  for (int64_t row = 0; row < args.rows; ++row) {
    if (list[row] >= 0 && list[row] <= args.neurons) continue;
    check.fail(PyExc_IndexError, ("widths[" + std::to_string(row) + "]").c_str(),
               "be in 0.." + std::to_string(args.neurons), std::to_string(list[row]));
  }
  return list;
}

int64_t prefix_row_ffn(const TensorView& out, const TensorView& workspace, const TensorView& input,
                       const TensorView& widths, const TensorView& gate, const TensorView& up,
                       const TensorView& down, py::handle activation) {
  const Check check("prefix_row_ffn");
  check.tensor(input, "input", 2);
  check.tensor(up, "up", 2);
  check.tensor(down, "down", 2);
  PrefixRowFfnArgs args{};
  args.dtype = check.dtype(input, "input", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  args.rows = input.size(0);
  args.in_features = input.size(1);
  args.neurons = up.size(0);
  args.out_features = down.size(0);
  if (args.rows > kMaxPrefixRows) {
    check.fail(PyExc_ValueError, "input", "have at most 16 rows", check.shape(input));
  }
  if (args.in_features < kMinPrefixFeatures || args.in_features % kPrefixStep != 0) {
    check.fail(PyExc_ValueError, "input", "have a multiple of 8 features, 32 or more",
               check.shape(input));
  }
  if (args.neurons % kPrefixStep != 0) {
    check.fail(PyExc_ValueError, "up", "have a multiple of 8 neurons", check.shape(up));
  }
  check.last_contiguous(input, "input");
  args.activation = activation_of(check, activation);
  const int64_t neurons = args.neurons;
  args.up = prefix_weight(check, up, "up", neurons, args.in_features, args.dtype, input);
  args.up_stride = up.stride(0);
  args.down = prefix_weight(check, down, "down", args.out_features, neurons, args.dtype, input);
  args.down_stride = down.stride(0);
  if (gate.given()) {
    args.gate = prefix_weight(check, gate, "gate", neurons, args.in_features, args.dtype, input);
    args.gate_stride = gate.stride(0);
  }
  args.widths = prefix_widths(check, widths, args, input);
  check.tensor(out, "out", 2);
  check.size(out, "out", 0, args.rows);
  check.size(out, "out", 1, args.out_features);
  check.dtype(out, "out", {args.dtype});
  check.same_device(out, "out", input);
  check.contiguous(out, "out");
  args.input = input.data<void>();
  args.input_stride = input.stride(0);
  args.out = out.data<void>();
  if (out.numel() == 0) return 0;
  return launch(
      check, "prefix_row_ffn", input, "input", workspace, [&] { cpu::prefix_row_ffn(args); },
      [&] { return cuda::prefix_row_ffn_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        cuda::prefix_row_ffn(args, memory, bytes, stream);
      });
}

}  // namespace

void bind_prefix_row_ffn(py::module_& m) {
  m.def("prefix_row_ffn", &prefix_row_ffn, py::arg("out"), py::arg("workspace"), py::arg("input"),
        py::arg("widths"), py::arg("gate"), py::arg("up"), py::arg("down"),
        py::arg("activation") = "silu");
}

}  // namespace adaptive
