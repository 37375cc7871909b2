// The binding of tree_attention: checks every argument, then launches on the query's device.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "bind_verify.h"
#include "tree_attention.h"

namespace adaptive {
namespace {

namespace py = pybind11;

int64_t tree_attention(const TensorView& out, const TensorView& lse, const TensorView& workspace,
                       const TensorView& query, const TensorView& key, const TensorView& value,
                       const TensorView& parents, const TensorView& mask, py::handle scale,
                       py::handle softcap) {
  const Check check("tree_attention");
  const TensorView none{};
  DecodeAttentionArgs args =
      attention_args(check, {query, key, &value, none, none, scale, softcap, py::bool_(true)});
  if (args.capacity < args.query_tokens) {
    check.fail(PyExc_ValueError, "key",
               "end with the keys of the " + std::to_string(args.query_tokens) + " nodes",
               check.shape(key));
  }
  args.parents = check_parents(check, parents, args.batch, args.query_tokens, nullptr, query);
  if (mask.given()) {
    check_rows(check, mask, "mask", DType::kBool, {args.batch, args.capacity}, query);
    args.mask = mask.data<void>();
    args.mask_stride[0] = mask.stride(0);
    args.mask_stride[3] = 1;
  }
  set_attention_outputs(check, &out, lse, query, args);
  if (lse.numel() == 0) return 0;
  return launch(
      check, "tree_attention", query, "query", workspace, [&] { cpu::decode_attention(args); },
      [&] { return cuda::tree_attention_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.workspace = memory;
        args.workspace_bytes = bytes;
        cuda::tree_attention(args, stream);
      });
}

}  // namespace

void bind_tree_attention(py::module_& m) {
  m.def("tree_attention", &tree_attention, py::arg("out"), py::arg("lse"), py::arg("workspace"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("parents"),
        py::arg("mask") = py::none(), py::kw_only(), py::arg("scale") = py::none(),
        py::arg("softcap") = 0.0);
}

}  // namespace adaptive
