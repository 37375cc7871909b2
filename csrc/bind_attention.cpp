// The checks that the bindings of attention ops share.

#include "bind_attention.h"

namespace adaptive {
namespace {

constexpr int64_t kMaxQueryTokens = 16;
constexpr int64_t kMinHeadDim = 32, kMaxHeadDim = 256;
constexpr int64_t kHeadDimStep = 8;

void set_mask(const Check& check, const TensorView& mask, DecodeAttentionArgs& args) {
  const int64_t full[4] = {args.batch, args.heads, args.query_tokens, args.capacity};
  check.broadcast(mask, "mask", full, args.mask_stride);
  args.mask = mask.data<void>();
  args.mask_add = check.dtype(mask, "mask", {DType::kBool, DType::kFloat32}) == DType::kFloat32;
}

void check_cache(const Check& check, const TensorView& cache, const char* name,
                 const TensorView& query, DType dtype) {
  check.dtype(cache, name, {dtype});
  check.same_device(cache, name, query);
  check.last_contiguous(cache, name);
}

}  // namespace

float check_scale(const Check& check, pybind11::handle scale, int64_t head_dim) {
  return scale.is_none() ? static_cast<float>(1 / std::sqrt(double(head_dim)))
                         : check.number(scale, "scale");
}

float check_softcap(const Check& check, pybind11::handle softcap) {
  const float value = check.number(softcap, "softcap");
  // What float32 rounds to zero would switch the cap off.
  if (value < 0 || (value == 0 && PyFloat_AsDouble(softcap.ptr()) != 0)) {
    check.fail(PyExc_ValueError, "softcap", "be 0 (off) or positive in float32",
               Check::text(softcap));
  }
  return value;
}

void check_grouping(const Check& check, int64_t heads, int64_t kv_heads) {
  if (kv_heads == 0 ? heads != 0 : heads % kv_heads != 0) {
    check.fail(PyExc_ValueError, "query",
               "have a multiple of key's " + std::to_string(kv_heads) + " heads",
               std::to_string(heads));
  }
}

void set_strides(const TensorView& view, int64_t (&strides)[3]) {
  for (int axis = 0; axis < 3; ++axis) strides[axis] = view.stride(axis);
}

void check_head_dim(const Check& check, const TensorView& view, const char* name) {
  const int64_t size = view.size(3);
  if (size < kMinHeadDim || size > kMaxHeadDim || size % kHeadDimStep != 0) {
    check.fail(PyExc_ValueError, name, "have a head_dim of 32..256 that is a multiple of 8",
               check.shape(view));
  }
}

const int32_t* check_lengths(const Check& check, const TensorView& lengths, int64_t batch,
                             int64_t capacity, const TensorView& like) {
  if (!lengths.given()) return nullptr;
  check.tensor(lengths, "lengths", 1);
  check.same_device(lengths, "lengths", like);
  check.dtype(lengths, "lengths", {DType::kInt32});
  check.size(lengths, "lengths", 0, batch);
  check.last_contiguous(lengths, "lengths");
  const int32_t* values = lengths.data<int32_t>();
  if (lengths.tensor.device.type != dlpack::kCpu) return values;  // the CUDA kernel looks itself
  for (int64_t row = 0; row < batch; ++row) {
    if (values[row] < 0 || values[row] > capacity) {
      check.fail(PyExc_IndexError, ("lengths[" + std::to_string(row) + "]").c_str(),
                 "be in 0.." + std::to_string(capacity), std::to_string(values[row]));
    }
  }
  return values;
}

const int64_t* check_cache_rows(const Check& check, const TensorView& rows, int64_t batch,
                                int64_t cache_batch, const TensorView& like) {
  check.tensor(rows, "cache_rows", 1);
  check.same_device(rows, "cache_rows", like);
  check.dtype(rows, "cache_rows", {DType::kInt64});
  check.size(rows, "cache_rows", 0, batch);
  check.last_contiguous(rows, "cache_rows");
  const int64_t* values = rows.data<int64_t>();
  if (rows.tensor.device.type != dlpack::kCpu) return values;  // the CUDA kernel looks itself
  for (int64_t row = 0; row < batch; ++row) {
    if (values[row] < 0 || values[row] >= cache_batch) {
      check.fail(PyExc_IndexError, ("cache_rows[" + std::to_string(row) + "]").c_str(),
                 "be in 0.." + std::to_string(cache_batch - 1), std::to_string(values[row]));
    }
  }
  return values;
}

DecodeAttentionArgs attention_args(const Check& check, const AttentionInputs& inputs) {
  const TensorView &query = inputs.query, &key = inputs.key;
  check.tensor(query, "query", 4);
  check.tensor(key, "key", 4);
  if (inputs.value != nullptr) check.tensor(*inputs.value, "value", 4);

  DecodeAttentionArgs args{};
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.query_tokens = query.size(2);
  args.head_dim = query.size(3);
  args.kv_heads = key.size(1);
  args.capacity = key.size(2);
  args.causal = check.flag(inputs.causal, "causal");

  if (args.query_tokens > kMaxQueryTokens) {
    check.fail(PyExc_ValueError, "query", "have at most 16 query tokens", check.shape(query));
  }
  check_head_dim(check, query, "query");
  const bool chosen = inputs.cache_rows != nullptr && inputs.cache_rows->given();
  args.cache_batch = chosen ? key.size(0) : args.batch;
  check.size(key, "key", 0, args.cache_batch);
  check.size(key, "key", 3, args.head_dim);
  if (inputs.value != nullptr) {
    for (int axis = 0; axis < 4; ++axis) check.size(*inputs.value, "value", axis, key.size(axis));
  }
  check_grouping(check, args.heads, args.kv_heads);

  args.dtype = check.dtype(query, "query", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  check.last_contiguous(query, "query");
  check_cache(check, key, "key", query, args.dtype);
  if (inputs.value != nullptr) check_cache(check, *inputs.value, "value", query, args.dtype);
  args.scale = check_scale(check, inputs.scale, args.head_dim);
  args.softcap = check_softcap(check, inputs.softcap);

  args.lengths = check_lengths(check, inputs.lengths, args.batch, args.capacity, query);
  if (chosen) {
    args.cache_rows =
        check_cache_rows(check, *inputs.cache_rows, args.batch, args.cache_batch, query);
  }
  if (inputs.mask.given()) {
    check.tensor(inputs.mask, "mask", -1);
    check.same_device(inputs.mask, "mask", query);
    set_mask(check, inputs.mask, args);
  }
  args.query = query.data<void>();
  args.key = key.data<void>();
  set_strides(query, args.query_stride);
  set_strides(key, args.key_stride);
  if (inputs.value != nullptr) {
    args.value = inputs.value->data<void>();
    set_strides(*inputs.value, args.value_stride);
  }
  return args;
}

void check_output(const Check& check, const TensorView& output, const char* name,
                  std::initializer_list<int64_t> sizes, const TensorView& like) {
  check.tensor(output, name, static_cast<int>(sizes.size()));
  check.dtype(output, name, {DType::kFloat32});
  check.same_device(output, name, like);
  int axis = 0;
  for (const int64_t size : sizes) check.size(output, name, axis++, size);
}

void set_attention_outputs(const Check& check, const TensorView* out, const TensorView& lse,
                           const TensorView& query, DecodeAttentionArgs& args) {
  if (out != nullptr) {
    check_output(check, *out, "out", {args.batch, args.heads, args.query_tokens, args.head_dim},
                 query);
    check.last_contiguous(*out, "out");
    args.out = out->data<float>();
    set_strides(*out, args.out_stride);
  }
  check_output(check, lse, "lse", {args.batch, args.heads, args.query_tokens}, query);
  check.contiguous(lse, "lse");
  args.lse = lse.data<float>();
}

}  // namespace adaptive
