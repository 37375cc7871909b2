// The binding of local_attention, and the checks that it shares with block_sparse_attention.

#include "bind_local_attention.h"

#include <pybind11/pybind11.h>

#include <algorithm>

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxTokens = int64_t{1} << 24;  // so that a position is exact as a float

}  // namespace

LocalAttentionArgs local_args(const Check& check, const LocalInputs& inputs) {
  const auto& [out, lse, query, key, value, offsets, scale, softcap, causal] = inputs;
  check.tensor(query, "query", 4);
  check.tensor(key, "key", 4);
  check.tensor(value, "value", 4);
  LocalAttentionArgs args{};
  args.batch = query.size(0);
  args.heads = query.size(1);
  args.query_tokens = query.size(2);
  args.head_dim = query.size(3);
  args.kv_heads = key.size(1);
  args.tokens = key.size(2);
  args.window = args.tokens;
  args.causal = check.flag(causal, "causal");
  check_head_dim(check, query, "query");
  check.size(key, "key", 0, args.batch);
  check.size(key, "key", 3, args.head_dim);
  for (int axis = 0; axis < 4; ++axis) check.size(value, "value", axis, key.size(axis));
  check_grouping(check, args.heads, args.kv_heads);
  if (args.tokens > kMaxTokens) {
    check.fail(PyExc_ValueError, "key", "have at most 16777216 tokens", check.shape(key));
  }
  if (args.query_tokens > args.tokens) {
    check.fail(PyExc_ValueError, "query",
               "have at most key's " + std::to_string(args.tokens) + " tokens", check.shape(query));
  }
  args.dtype = check.dtype(query, "query", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  check.last_contiguous(query, "query");
  for (const auto& [view, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
    check.dtype(*view, name, {args.dtype});
    check.same_device(*view, name, query);
    check.last_contiguous(*view, name);
  }
  args.scale = check_scale(check, scale, args.head_dim);
  args.softcap = check_softcap(check, softcap);
  const Cuts cuts = check_offsets(check, offsets, args.batch, args.tokens, query);
  args.offsets = cuts.offsets;
  args.offsets_stride = cuts.stride;
  args.cuts = cuts.count;

  const int64_t sizes[4] = {args.batch, args.heads, args.query_tokens, args.head_dim};
  check.tensor(out, "out", 4);
  check.dtype(out, "out", {args.dtype});
  check.same_device(out, "out", query);
  for (int axis = 0; axis < 4; ++axis) check.size(out, "out", axis, sizes[axis]);
  check.last_contiguous(out, "out");
  check_output(check, lse, "lse", {args.batch, args.heads, args.query_tokens}, query);
  check.contiguous(lse, "lse");

  args.query = query.data<void>();
  args.key = key.data<void>();
  args.value = value.data<void>();
  args.out = out.data<void>();
  args.lse = lse.data<float>();
  set_strides(query, args.query_stride);
  set_strides(key, args.key_stride);
  set_strides(value, args.value_stride);
  set_strides(out, args.out_stride);
  return args;
}

int64_t run_local(const Check& check, const char* op, const LocalInputs& inputs,
                  const TensorView& workspace, const LocalAttentionArgs& args) {
  if (inputs.lse.numel() == 0) return 0;
  return launch(
      check, op, inputs.query, "query", workspace, [&] { cpu::local_attention(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::local_attention(args, stream); });
}

namespace {

void set_windows(const Check& check, py::handle window, const TensorView& windows,
                 LocalAttentionArgs& args, const TensorView& like) {
  if (!window.is_none()) {
    args.window = check.integer(window, "window");
    if (args.window < 1) {
      check.fail(PyExc_ValueError, "window", "be at least 1", std::to_string(args.window));
    }
  }
  args.window = std::min(args.window, std::max<int64_t>(args.tokens, 1));
  if (!windows.given()) return;
  if (!window.is_none()) {
    check.fail(PyExc_ValueError, "window", "be None beside windows", Check::text(window));
  }
  check.tensor(windows, "windows", 1);
  check.dtype(windows, "windows", {DType::kInt32});
  check.same_device(windows, "windows", like);
  check.size(windows, "windows", 0, args.heads);
  check.last_contiguous(windows, "windows");
  args.windows = windows.data<int32_t>();
  if (windows.tensor.device.type != dlpack::kCpu) return;  // the CUDA kernel looks itself
  for (int64_t head = 0; head < args.heads; ++head) {
    if (args.windows[head] < 1) {
      check.fail(PyExc_IndexError, ("windows[" + std::to_string(head) + "]").c_str(),
                 "be at least 1", std::to_string(args.windows[head]));
    }
  }
}

int64_t local_attention(const TensorView& out, const TensorView& lse, const TensorView& workspace,
                        const TensorView& query, const TensorView& key, const TensorView& value,
                        py::handle window, const TensorView& windows, py::handle sinks,
                        const TensorView& offsets, py::handle scale, py::handle softcap,
                        py::handle causal) {
  const Check check("local_attention");
  const LocalInputs inputs{out, lse, query, key, value, offsets, scale, softcap, causal};
  LocalAttentionArgs args = local_args(check, inputs);
  set_windows(check, window, windows, args, query);
  args.sinks = check.integer(sinks, "sinks");
  if (args.sinks < 0) {
    check.fail(PyExc_ValueError, "sinks", "be at least 0", std::to_string(args.sinks));
  }
  args.sinks = std::min(args.sinks, args.tokens);
  return run_local(check, "local_attention", inputs, workspace, args);
}

}  // namespace

void bind_local_attention(py::module_& m) {
  m.def("local_attention", &local_attention, py::arg("out"), py::arg("lse"), py::arg("workspace"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("window") = py::none(),
        py::arg("windows") = py::none(), py::arg("sinks") = 0, py::arg("offsets") = py::none(),
        py::arg("scale") = py::none(), py::arg("softcap") = 0.0, py::arg("causal") = true);
}

}  // namespace adaptive
