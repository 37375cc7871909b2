// The bindings of gather_attention and sum_tokens, which read chosen keys of a cache.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_attention.h"
#include "gather_attention.h"
#include "sum_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxPage = 64, kMaxExtra = 64;

/// The tokens from outside the cache.
struct Extra {
  const TensorView& key;
  const TensorView& value;
  const TensorView& bias;
};

void set_choice(const Choice& choice, auto& args) {
  args.indices = choice.indices;
  args.counts = choice.counts;
  args.chosen = choice.chosen;
  for (int axis = 0; axis < 2; ++axis) {
    args.indices_stride[axis] = choice.indices_stride[axis];
    args.counts_stride[axis] = choice.counts_stride[axis];
  }
}

void set_extra(const Check& check, const Extra& extra, const TensorView& query,
               GatherAttentionArgs& args) {
  const bool given[3] = {extra.key.given(), extra.value.given(), extra.bias.given()};
  if (!given[0] && !given[1] && !given[2]) return;
  if (!given[0] || !given[1] || !given[2]) {
    check.fail(PyExc_ValueError, "extra_key, extra_value and extra_bias", "be given together",
               "some without the others");
  }
  check.tensor(extra.key, "extra_key", 4);
  check.tensor(extra.value, "extra_value", 4);
  check.tensor(extra.bias, "extra_bias", 3);
  const DecodeAttentionArgs& sizes = args.attention;
  args.extra = extra.key.size(2);
  if (args.extra > kMaxExtra) {
    check.fail(PyExc_ValueError, "extra_key", "have at most 64 tokens", check.shape(extra.key));
  }
  const int64_t shape[4] = {sizes.batch, sizes.kv_heads, args.extra, sizes.head_dim};
  for (int axis = 0; axis < 4; ++axis) {
    check.size(extra.key, "extra_key", axis, shape[axis]);
    check.size(extra.value, "extra_value", axis, shape[axis]);
    if (axis < 3) check.size(extra.bias, "extra_bias", axis, shape[axis]);
  }
  check.dtype(extra.key, "extra_key", {sizes.dtype});
  check.dtype(extra.value, "extra_value", {sizes.dtype});
  check.dtype(extra.bias, "extra_bias", {DType::kFloat32});
  check.same_device(extra.key, "extra_key", query);
  check.same_device(extra.value, "extra_value", query);
  check.same_device(extra.bias, "extra_bias", query);
  check.last_contiguous(extra.key, "extra_key");
  check.last_contiguous(extra.value, "extra_value");
  args.extra_key = extra.key.data<void>();
  args.extra_value = extra.value.data<void>();
  args.extra_bias = extra.bias.data<float>();
  set_strides(extra.key, args.extra_key_stride);
  set_strides(extra.value, args.extra_value_stride);
  set_strides(extra.bias, args.extra_bias_stride);
}

int64_t gather_attention(const TensorView& out, const TensorView& lse, const TensorView& workspace,
                         const TensorView& query, const TensorView& key, const TensorView& value,
                         const TensorView& indices, const TensorView& counts,
                         const TensorView& lengths, const TensorView& mask,
                         const TensorView& extra_key, const TensorView& extra_value,
                         const TensorView& extra_bias, py::handle scale, py::handle softcap,
                         py::handle causal, int64_t page_size) {
  const Check check("gather_attention");
  GatherAttentionArgs args{};
  args.attention =
      attention_args(check, {query, key, &value, lengths, mask, scale, softcap, causal});
  if (page_size < 1 || page_size > kMaxPage || (page_size & (page_size - 1)) != 0) {
    check.fail(PyExc_ValueError, "page_size", "be a power of two in 1..64",
               std::to_string(page_size));
  }
  args.page_size = page_size;
  const DecodeAttentionArgs& sizes = args.attention;
  const int64_t pages = (sizes.capacity + page_size - 1) / page_size;
  set_choice(check_choice(check, indices, counts, sizes.batch, sizes.kv_heads, pages, query), args);
  set_extra(check, {extra_key, extra_value, extra_bias}, query, args);
  set_attention_outputs(check, &out, lse, query, args.attention);
  if (lse.numel() == 0) return 0;
  return launch(
      check, "gather_attention", query, "query", workspace, [&] { cpu::gather_attention(args); },
      [&] { return cuda::gather_attention_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.attention.workspace = memory;
        args.attention.workspace_bytes = bytes;
        cuda::gather_attention(args, stream);
      });
}

int64_t sum_tokens(const TensorView& sums, const TensorView& workspace, const TensorView& source,
                   const TensorView& indices, const TensorView& counts) {
  const Check check("sum_tokens");
  check.tensor(source, "source", 4);
  check_head_dim(check, source, "source");
  check.last_contiguous(source, "source");
  SumTokensArgs args{};
  args.dtype = check.dtype(source, "source", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  args.source = source.data<void>();
  args.batch = source.size(0);
  args.kv_heads = source.size(1);
  args.capacity = source.size(2);
  args.head_dim = source.size(3);
  set_strides(source, args.source_stride);
  set_choice(check_choice(check, indices, counts, args.batch, args.kv_heads, args.capacity, source),
             args);
  check_output(check, sums, "sums", {args.batch, args.kv_heads, args.head_dim}, source);
  check.contiguous(sums, "sums");
  args.sums = sums.data<float>();
  if (sums.numel() == 0) return 0;
  return launch(
      check, "sum_tokens", source, "source", workspace, [&] { cpu::sum_tokens(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::sum_tokens(args, stream); });
}

}  // namespace

void bind_gather_attention(py::module_& m) {
  m.def("gather_attention", &gather_attention, py::arg("out"), py::arg("lse"), py::arg("workspace"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("indices"), py::arg("counts"),
        py::arg("lengths") = py::none(), py::arg("mask") = py::none(),
        py::arg("extra_key") = py::none(), py::arg("extra_value") = py::none(),
        py::arg("extra_bias") = py::none(), py::arg("scale") = py::none(), py::arg("softcap") = 0.0,
        py::arg("causal") = true, py::arg("page_size") = 1);
  m.def("sum_tokens", &sum_tokens, py::arg("sums"), py::arg("workspace"), py::arg("source"),
        py::arg("indices"), py::arg("counts"));
}

}  // namespace adaptive
