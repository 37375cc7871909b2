// The binding of pool_blocks.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "pool_blocks.h"

namespace adaptive {
namespace {

namespace py = pybind11;

constexpr int64_t kMaxPooledTokens = INT32_MAX;

int64_t pool_blocks(const TensorView& means, const TensorView& workspace, const TensorView& source,
                    py::handle block_size, const TensorView& offsets) {
  const Check check("pool_blocks");
  check.tensor(source, "source", 4);
  check_head_dim(check, source, "source");
  check.last_contiguous(source, "source");
  PoolBlocksArgs args{};
  args.dtype = check.dtype(source, "source", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  args.source = source.data<void>();
  args.batch = source.size(0);
  args.heads = source.size(1);
  args.tokens = source.size(2);
  args.head_dim = source.size(3);
  if (args.tokens > kMaxPooledTokens) {
    check.fail(PyExc_ValueError, "source", "have fewer than 2^31 tokens", check.shape(source));
  }
  set_strides(source, args.source_stride);
  args.block_size = check.integer(block_size, "block_size");
  if (args.block_size < 1 || args.block_size > kMaxPooledTokens) {
    check.fail(PyExc_ValueError, "block_size", "be at least 1 and below 2^31",
               std::to_string(args.block_size));
  }
  const Cuts cuts = check_offsets(check, offsets, args.batch, args.tokens, source);
  args.offsets = cuts.offsets;
  args.offsets_stride = cuts.stride;
  args.cuts = cuts.count;
  check_output(check, means, "means", {args.batch, args.heads, args.blocks(), args.head_dim},
               source);
  check.contiguous(means, "means");
  args.means = means.data<float>();
  if (means.numel() == 0) return 0;
  return launch(
      check, "pool_blocks", source, "source", workspace, [&] { cpu::pool_blocks(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::pool_blocks(args, stream); });
}

}  // namespace

void bind_pool_blocks(py::module_& m) {
  m.def("pool_blocks", &pool_blocks, py::arg("means"), py::arg("workspace"), py::arg("source"),
        py::arg("block_size") = 64, py::arg("offsets") = py::none());
}

}  // namespace adaptive
