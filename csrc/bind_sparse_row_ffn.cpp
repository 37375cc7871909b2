// The binding of sparse_row_ffn: checks every argument, then launches on the activations' device.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "sparse_row_ffn.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxSparseFfnRows = 16, kMinSparseFeatures = 32, kSparseFeatureStep = 8;

/// Checks a matrix of the call and returns its data; rows of `features` elements that vectors fit.
const void* sparse_matrix(const Check& check, const TensorView& view, const char* name,
                          int64_t rows, const SparseRowFfnArgs& args, const TensorView& like) {
  check.tensor(view, name, 2);
  check.size(view, name, 0, rows);
  check.dtype(view, name, {args.dtype});
  check.same_device(view, name, like);
  check.last_contiguous(view, name);
  if (view.size(1) < kMinSparseFeatures || view.size(1) % kSparseFeatureStep != 0) {
    check.fail(PyExc_ValueError, name, "have a multiple of 8 features, 32 or more",
               check.shape(view));
  }
  return view.data<void>();
}

int64_t sparse_row_ffn(const TensorView& out, const TensorView& workspace,
                       const TensorView& activations, const TensorView& input, const TensorView& up,
                       const TensorView& down) {
  const Check check("sparse_row_ffn");
  const char* first = "activations";
  check.tensor(activations, first, 2);
  SparseRowFfnArgs args{};
  args.dtype =
      check.dtype(activations, first, {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  args.rows = activations.size(0);
  args.neurons = activations.size(1);
  if (args.rows > kMaxSparseFfnRows) {
    check.fail(PyExc_ValueError, first, "have at most 16 rows", check.shape(activations));
  }
  check.last_contiguous(activations, first);
  args.input = sparse_matrix(check, input, "input", args.rows, args, activations);
  args.up = sparse_matrix(check, up, "up", args.neurons, args, activations);
  args.down = sparse_matrix(check, down, "down", args.neurons, args, activations);
  args.in_features = input.size(1);
  args.out_features = down.size(1);
  check.size(up, "up", 1, args.in_features);
  check.tensor(out, "out", 2);
  check.size(out, "out", 0, args.rows);
  check.size(out, "out", 1, args.out_features);
  check.dtype(out, "out", {args.dtype});
  check.same_device(out, "out", activations);
  check.contiguous(out, "out");
  args.activations = activations.data<void>();
  args.out = out.data<void>();
  args.activations_stride = activations.stride(0);
  args.input_stride = input.stride(0);
  args.up_stride = up.stride(0);
  args.down_stride = down.stride(0);
  if (out.numel() == 0) return 0;
  return launch(
      check, "sparse_row_ffn", activations, first, workspace, [&] { cpu::sparse_row_ffn(args); },
      [&] { return cuda::sparse_row_ffn_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        cuda::sparse_row_ffn(args, memory, bytes, stream);
      });
}

}  // namespace

void bind_sparse_row_ffn(py::module_& m) {
  m.def("sparse_row_ffn", &sparse_row_ffn, py::arg("out"), py::arg("workspace"),
        py::arg("activations"), py::arg("input"), py::arg("up"), py::arg("down"));
}

}  // namespace adaptive
