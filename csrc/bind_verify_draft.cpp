// The binding of verify_draft: checks every argument, then launches on the drafted tokens' device.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "bind_verify.h"
#include "verify_draft.h"

namespace adaptive {
namespace {

namespace py = pybind11;

int64_t verify_draft(const TensorView& accepted, const TensorView& path, const TensorView& tokens,
                     const TensorView& workspace, const TensorView& drafted,
                     const TensorView& choices, const TensorView& parents,
                     const TensorView& lengths) {
  const Check check("verify_draft");
  check.tensor(drafted, "drafted", 2);
  VerifyDraftArgs args{};
  const int64_t batch = args.batch = drafted.size(0), nodes = args.nodes = drafted.size(1);
  constexpr DType kInt64 = DType::kInt64;
  check_rows(check, drafted, "drafted", kInt64, {batch, nodes}, drafted);
  check_rows(check, choices, "choices", kInt64, {batch, nodes + 1}, drafted);
  args.drafted = drafted.data<int64_t>();
  args.drafted_stride = drafted.stride(0);
  args.choices = choices.data<int64_t>();
  args.choices_stride = choices.stride(0);
  args.lengths = check_node_counts(check, lengths, batch, nodes, drafted);
  if (parents.given()) {
    args.parents = check_parents(check, parents, batch, nodes, args.lengths, drafted);
  }
  args.accepted = contiguous_rows<int64_t>(check, accepted, "accepted", kInt64, {batch}, drafted);
  args.path = contiguous_rows<int64_t>(check, path, "path", kInt64, {batch, nodes + 1}, drafted);
  args.tokens =
      contiguous_rows<int64_t>(check, tokens, "tokens", kInt64, {batch, nodes + 1}, drafted);
  if (batch == 0) return 0;
  return launch(
      check, "verify_draft", drafted, "drafted", workspace, [&] { cpu::verify_draft(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::verify_draft(args, stream); });
}

}  // namespace

void bind_verify_draft(py::module_& m) {
  m.def("verify_draft", &verify_draft, py::arg("accepted"), py::arg("path"), py::arg("tokens"),
        py::arg("workspace"), py::arg("drafted"), py::arg("choices"),
        py::arg("parents") = py::none(), py::arg("lengths") = py::none());
}

}  // namespace adaptive
