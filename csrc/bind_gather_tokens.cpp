// The binding of gather_tokens: checks every argument, then launches on the device of hidden.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "bind_tokens.h"
#include "gather_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

int64_t gather_tokens(const TensorView& out, const TensorView& workspace, const TensorView& hidden,
                      const TensorView& tokens) {
  const Check check("gather_tokens");
  GatherTokensArgs args{};
  set_listed(check, args, hidden, tokens);
  check_rows(check, out, "out", args.dtype, {args.batch, args.chosen, args.width}, hidden);
  check.contiguous(out, "out");
  args.out = out.data<void>();
  if (out.numel() == 0) return 0;
  return launch(
      check, "gather_tokens", hidden, "hidden", workspace, [&] { cpu::gather_tokens(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::gather_tokens(args, stream); });
}

}  // namespace

void bind_gather_tokens(py::module_& m) {
  m.def("gather_tokens", &gather_tokens, py::arg("out"), py::arg("workspace"), py::arg("hidden"),
        py::arg("tokens"));
}

}  // namespace adaptive
