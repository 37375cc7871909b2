// The binding of block_sparse_attention.

#include <pybind11/pybind11.h>

#include "bind_local_attention.h"

namespace adaptive {
namespace {

namespace py = pybind11;

// The lists of blocks: shapes, then on the CPU every entry.
void set_lists(const Check& check, const TensorView& indices, const TensorView& counts,
               int64_t block_size, LocalAttentionArgs& args, const TensorView& like) {
  if (block_size != 16 && block_size != 32 && block_size != 64 && block_size != 128) {
    check.fail(PyExc_ValueError, "block_size", "be 16, 32, 64 or 128", std::to_string(block_size));
  }
  args.block_size = block_size;
  check.tensor(indices, "indices", 4);
  check.tensor(counts, "counts", 3);
  args.lists = indices.size(1);
  if (args.lists != args.kv_heads && args.lists != args.heads) {
    check.fail(PyExc_ValueError, "indices",
               "have a list for each of " + std::to_string(args.kv_heads) + " KV heads or " +
                   std::to_string(args.heads) + " heads",
               check.shape(indices));
  }
  const int64_t query_blocks = (args.query_tokens + block_size - 1) / block_size;
  const int64_t sizes[3] = {args.batch, args.lists, query_blocks};
  for (const auto& [view, name] : {std::pair{&indices, "indices"}, std::pair{&counts, "counts"}}) {
    check.dtype(*view, name, {DType::kInt32});
    check.same_device(*view, name, like);
    for (int axis = 0; axis < 3; ++axis) check.size(*view, name, axis, sizes[axis]);
  }
  check.last_contiguous(indices, "indices");
  args.chosen = indices.size(3);
  args.blocks = indices.data<int32_t>();
  args.counts = counts.data<int32_t>();
  set_strides(indices, args.blocks_stride);
  set_strides(counts, args.counts_stride);
  if (indices.tensor.device.type != dlpack::kCpu) return;  // the CUDA kernel looks itself
  const int64_t key_blocks = (args.tokens + block_size - 1) / block_size;
  for (int64_t i = 0; i < args.batch * args.lists; ++i) {
    const int64_t row = i / args.lists, list = i % args.lists;
    const Choice choice{
        .indices = args.blocks + row * args.blocks_stride[0] + list * args.blocks_stride[1],
        .indices_stride = {0, args.blocks_stride[2]},
        .counts = args.counts + row * args.counts_stride[0] + list * args.counts_stride[1],
        .counts_stride = {0, args.counts_stride[2]},
        .chosen = args.chosen};
    const std::string place = std::to_string(row) + ", " + std::to_string(list);
    for (int64_t block = 0; block < query_blocks; ++block) {
      check_list(check, choice, 0, block, key_blocks, place);
    }
  }
}

int64_t block_sparse_attention(const TensorView& out, const TensorView& lse,
                               const TensorView& workspace, const TensorView& query,
                               const TensorView& key, const TensorView& value,
                               const TensorView& indices, const TensorView& counts,
                               py::handle block_size, const TensorView& offsets, py::handle scale,
                               py::handle softcap, py::handle causal) {
  const Check check("block_sparse_attention");
  const LocalInputs inputs{out, lse, query, key, value, offsets, scale, softcap, causal};
  LocalAttentionArgs args = local_args(check, inputs);
  set_lists(check, indices, counts, check.integer(block_size, "block_size"), args, query);
  return run_local(check, "block_sparse_attention", inputs, workspace, args);
}

}  // namespace

void bind_block_sparse_attention(py::module_& m) {
  m.def("block_sparse_attention", &block_sparse_attention, py::arg("out"), py::arg("lse"),
        py::arg("workspace"), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("indices"), py::arg("counts"), py::arg("block_size") = 64,
        py::arg("offsets") = py::none(), py::arg("scale") = py::none(), py::arg("softcap") = 0.0,
        py::arg("causal") = true);
}

}  // namespace adaptive
