// The binding of merge_tokens: checks every argument, then launches on hidden's device.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind_attention.h"
#include "bind_verify.h"
#include "merge_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

/// Rows of 16-bit elements or floats that kernels read 8 at a time.
void check_features(const Check& check, const TensorView& view, const char* name, int64_t least) {
  const int64_t width = view.size(2);
  if (width < least || width % 8 != 0) {
    check.fail(PyExc_ValueError, name, "have a multiple of 8 features", check.shape(view));
  }
  check.last_contiguous(view, name);
}

const int32_t* check_row_counts(const Check& check, const TensorView& view, const char* name,
                                int64_t batch, int64_t most, const TensorView& like) {
  if (!view.given()) return nullptr;
  const auto* values =
      contiguous_rows<const int32_t>(check, view, name, DType::kInt32, {batch}, like);
  if (view.tensor.device.type != dlpack::kCpu) return values;
  for (int64_t row = 0; row < batch; ++row) {
    if (values[row] < 0 || values[row] > most) {
      const std::string at = std::string(name) + "[" + std::to_string(row) + "]";
      check.fail(PyExc_IndexError, at.c_str(), "be in 0.." + std::to_string(most),
                 std::to_string(values[row]));
    }
  }
  return values;
}

int64_t merge_tokens(const TensorView& out, const TensorView& out_sizes, const TensorView& groups,
                     const TensorView& workspace, const TensorView& hidden,
                     const TensorView& metric, py::handle removed, const TensorView& sizes,
                     const TensorView& lengths, const TensorView& counts, py::handle protect) {
  const Check check("merge_tokens");
  MergeTokensArgs args{};
  check.tensor(hidden, "hidden", 3);
  args.dtype = check.dtype(hidden, "hidden", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  const int64_t batch = args.batch = hidden.size(0), tokens = args.tokens = hidden.size(1);
  args.width = hidden.size(2);
  check_features(check, hidden, "hidden", 0);
  if (tokens > INT32_MAX) {
    check.fail(PyExc_ValueError, "hidden", "have fewer than 2^31 tokens", check.shape(hidden));
  }
  check.tensor(metric, "metric", 3);
  check.dtype(metric, "metric", {args.dtype});
  check.same_device(metric, "metric", hidden);
  check.size(metric, "metric", 0, batch);
  check.size(metric, "metric", 1, tokens);
  check_features(check, metric, "metric", 8);
  args.metric_width = metric.size(2);
  args.protect = check.integer(protect, "protect");
  if (args.protect < 0) {
    check.fail(PyExc_ValueError, "protect", "be at least 0", std::to_string(args.protect));
  }
  if (args.protect > tokens) args.protect = tokens;
  args.removed = check.integer(removed, "removed");
  if (args.removed < 0 || args.removed > args.possible(tokens)) {
    check.fail(PyExc_ValueError, "removed", "be in 0.." + std::to_string(args.possible(tokens)),
               std::to_string(args.removed));
  }
  args.hidden = hidden.data<void>();
  args.metric = metric.data<void>();
  for (int axis = 0; axis < 2; ++axis) {
    args.hidden_stride[axis] = hidden.stride(axis);
    args.metric_stride[axis] = metric.stride(axis);
  }
  if (sizes.given()) {
    args.sizes = contiguous_rows<const float>(check, sizes, "sizes", DType::kFloat32,
                                              {batch, tokens}, hidden);
  }
  args.lengths = check_row_counts(check, lengths, "lengths", batch, tokens, hidden);
  args.counts = check_row_counts(check, counts, "counts", batch, INT32_MAX, hidden);
  args.out = contiguous_rows<void>(check, out, "out", args.dtype, {batch, args.kept(), args.width},
                                   hidden);
  args.out_sizes = contiguous_rows<float>(check, out_sizes, "out_sizes", DType::kFloat32,
                                          {batch, args.kept()}, hidden);
  args.groups =
      contiguous_rows<int64_t>(check, groups, "groups", DType::kInt64, {batch, tokens}, hidden);
  if (batch == 0 || tokens == 0) return 0;
  return launch(
      check, "merge_tokens", hidden, "hidden", workspace, [&] { cpu::merge_tokens(args); },
      [&] { return cuda::merge_tokens_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.workspace = memory;
        args.workspace_bytes = bytes;
        cuda::merge_tokens(args, stream);
      });
}

}  // namespace

void bind_merge_tokens(py::module_& m) {
  m.def("merge_tokens", &merge_tokens, py::arg("out"), py::arg("out_sizes"), py::arg("groups"),
        py::arg("workspace"), py::arg("hidden"), py::arg("metric"), py::arg("removed"),
        py::arg("sizes") = py::none(), py::arg("lengths") = py::none(),
        py::arg("counts") = py::none(), py::arg("protect") = 1);
}

}  // namespace adaptive
