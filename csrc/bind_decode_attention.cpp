// The binding of decode_attention: checks every argument, then launches on the query's device.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <string>

#include "bindings.h"
#include "check.h"
#include "decode_attention.h"
#include "tensor_view.h"
#ifdef ADAPTIVE_CUDA
#include "cuda/device.h"
#endif

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxQueryTokens = 16;
constexpr int64_t kMinHeadDim = 32, kMaxHeadDim = 256;
constexpr int64_t kHeadDimStep = 8;

void set_strides(const TensorView& view, int64_t (&strides)[3]) {
  for (int axis = 0; axis < 3; ++axis) strides[axis] = view.stride(axis);
}

void set_mask(const Check& check, const TensorView& mask, DecodeAttentionArgs& args) {
  const int64_t full[4] = {args.batch, args.heads, args.query_tokens, args.capacity};
  check.broadcast(mask, "mask", full, args.mask_stride);
  args.mask = mask.data<void>();
  args.mask_add = check.dtype(mask, "mask", {DType::kBool, DType::kFloat32}) == DType::kFloat32;
}

void set_lengths(const Check& check, const TensorView& lengths, DecodeAttentionArgs& args) {
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

DecodeAttentionArgs decode_attention_args(const TensorView& query, const TensorView& key,
                                          const TensorView& value, const TensorView& lengths,
                                          const TensorView& mask, py::handle scale,
                                          py::handle softcap, py::handle causal) {
  const Check check("decode_attention");
  check.tensor(query, "query", 4);
  check.tensor(key, "key", 4);
  check.tensor(value, "value", 4);

  DecodeAttentionArgs args{};
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.query_tokens = query.size(2);
  args.head_dim = query.size(3);
  args.kv_heads = key.size(1);
  args.capacity = key.size(2);
  args.causal = check.flag(causal, "causal");

  if (args.query_tokens > kMaxQueryTokens) {
    check.fail(PyExc_ValueError, "query", "have at most 16 query tokens", check.shape(query));
  }
  if (args.head_dim < kMinHeadDim || args.head_dim > kMaxHeadDim ||
      args.head_dim % kHeadDimStep != 0) {
    check.fail(PyExc_ValueError, "query", "have a head_dim of 32..256 that is a multiple of 8",
               check.shape(query));
  }
  check.size(key, "key", 0, args.batch);
  check.size(key, "key", 3, args.head_dim);
  for (int axis = 0; axis < 4; ++axis) check.size(value, "value", axis, key.size(axis));
  if (args.kv_heads == 0 ? args.heads != 0 : args.heads % args.kv_heads != 0) {
    check.fail(PyExc_ValueError, "query",
               "have a multiple of key's " + std::to_string(args.kv_heads) + " heads",
               std::to_string(args.heads));
  }

  args.dtype = check.dtype(query, "query", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  check.dtype(key, "key", {args.dtype});
  check.dtype(value, "value", {args.dtype});
  check.same_device(key, "key", query);
  check.same_device(value, "value", query);
  check.last_contiguous(query, "query");
  check.last_contiguous(key, "key");
  check.last_contiguous(value, "value");

  args.scale = scale.is_none() ? static_cast<float>(1 / std::sqrt(double(args.head_dim)))
                               : check.number(scale, "scale");
  args.softcap = check.number(softcap, "softcap");
  // What float32 rounds to zero would switch the cap off.
  if (args.softcap < 0 || (args.softcap == 0 && PyFloat_AsDouble(softcap.ptr()) != 0)) {
    check.fail(PyExc_ValueError, "softcap", "be 0 (off) or positive in float32",
               Check::text(softcap));
  }

  if (lengths.given()) {
    check.tensor(lengths, "lengths", 1);
    check.same_device(lengths, "lengths", query);
    set_lengths(check, lengths, args);
  }
  if (mask.given()) {
    check.tensor(mask, "mask", -1);
    check.same_device(mask, "mask", query);
    set_mask(check, mask, args);
  }
  args.query = query.data<void>();
  args.key = key.data<void>();
  args.value = value.data<void>();
  set_strides(query, args.query_stride);
  set_strides(key, args.key_stride);
  set_strides(value, args.value_stride);
  return args;
}

#ifdef ADAPTIVE_CUDA
Stream current_stream(const TensorView& view) {
  void* stream = nullptr;
  const auto& device = view.tensor.device;
  if (view.api->current_stream(device.type, device.id, &stream) != 0) throw py::error_already_set();
  return static_cast<Stream>(stream);
}
#endif

void check_outputs(const Check& check, const TensorView& out, const TensorView& lse,
                   const TensorView& query) {
  check.tensor(out, "out", 4);
  check.tensor(lse, "lse", 3);
  check.dtype(out, "out", {DType::kFloat32});
  check.dtype(lse, "lse", {DType::kFloat32});
  check.same_device(out, "out", query);
  check.same_device(lse, "lse", query);
  for (int axis = 0; axis < 4; ++axis) check.size(out, "out", axis, query.size(axis));
  for (int axis = 0; axis < 3; ++axis) check.size(lse, "lse", axis, query.size(axis));
  check.last_contiguous(out, "out");
  check.contiguous(lse, "lse");
}

// Fills `out` and `lse` and returns 0; or returns the bytes of workspace that it must be called
// again with, which is what a CUDA kernel that splits the keys asks for.
int64_t decode_attention(const TensorView& out, const TensorView& lse,
                         [[maybe_unused]] const TensorView& workspace, const TensorView& query,
                         const TensorView& key, const TensorView& value, const TensorView& lengths,
                         const TensorView& mask, py::handle scale, py::handle softcap,
                         py::handle causal) {
  DecodeAttentionArgs args =
      decode_attention_args(query, key, value, lengths, mask, scale, softcap, causal);
  const Check check("decode_attention");
  check_outputs(check, out, lse, query);
  args.out = out.data<float>();
  args.lse = lse.data<float>();
  set_strides(out, args.out_stride);
  if (lse.numel() == 0) return 0;

  if (query.tensor.device.type == dlpack::kCpu) {
    count_call("decode_attention:cpu");
    const py::gil_scoped_release release;
    cpu::decode_attention(args);
    return 0;
  }
#ifdef ADAPTIVE_CUDA
  if (query.tensor.device.type == dlpack::kCuda) {
    const cuda::DeviceGuard guard(query.tensor.device.id);
    const int64_t wanted = cuda::decode_attention_workspace_bytes(args);
    if (workspace.given()) {
      check.tensor(workspace, "workspace", 1);
      check.same_device(workspace, "workspace", query);
      args.workspace = workspace.data<void>();
      args.workspace_bytes = workspace.numel() * workspace.tensor.dtype.bits / 8;
    }
    if (args.workspace_bytes < wanted) return wanted;
    const Stream stream = current_stream(query);
    count_call("decode_attention:cuda");
    const py::gil_scoped_release release;
    cuda::decode_attention(args, stream);
    return 0;
  }
#endif
  check.no_kernel(query, "query");
}

}  // namespace

void bind_decode_attention(py::module_& m) {
  m.def("decode_attention", &decode_attention, py::arg("out"), py::arg("lse"), py::arg("workspace"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("lengths") = py::none(),
        py::arg("mask") = py::none(), py::arg("scale") = py::none(), py::arg("softcap") = 0.0,
        py::arg("causal") = true);
}

}  // namespace adaptive
