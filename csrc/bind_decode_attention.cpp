// The binding of decode_attention: checks every argument, then launches on the query's device.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "decode_attention.h"

namespace adaptive {
namespace {

namespace py = pybind11;

// Fills `out` and `lse` and returns 0; or returns the bytes of workspace that it must be called
// again with, which is what a CUDA kernel that splits the keys asks for.
int64_t decode_attention(const TensorView& out, const TensorView& lse, const TensorView& workspace,
                         const TensorView& query, const TensorView& key, const TensorView& value,
                         const TensorView& lengths, const TensorView& mask, py::handle scale,
                         py::handle softcap, py::handle causal, const TensorView& cache_rows) {
  const Check check("decode_attention");
  DecodeAttentionArgs args = attention_args(
      check, {query, key, &value, lengths, mask, scale, softcap, causal, &cache_rows});
  set_attention_outputs(check, &out, lse, query, args);
  if (lse.numel() == 0) return 0;
  return launch(
      check, "decode_attention", query, "query", workspace, [&] { cpu::decode_attention(args); },
      [&] { return cuda::decode_attention_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.workspace = memory;
        args.workspace_bytes = bytes;
        cuda::decode_attention(args, stream);
      });
}

}  // namespace

void bind_decode_attention(py::module_& m) {
  m.def("decode_attention", &decode_attention, py::arg("out"), py::arg("lse"), py::arg("workspace"),
        py::arg("query"), py::arg("key"), py::arg("value"), py::arg("lengths") = py::none(),
        py::arg("mask") = py::none(), py::arg("scale") = py::none(), py::arg("softcap") = 0.0,
        py::arg("causal") = true, py::arg("cache_rows") = py::none());
}

}  // namespace adaptive
