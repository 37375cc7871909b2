// The binding of verify_samples: checks every argument, then launches on the drafted tokens'
// device.

#include <pybind11/pybind11.h>

#include "bind_attention.h"
#include "bind_verify.h"
#include "verify_samples.h"

namespace adaptive {
namespace {

namespace py = pybind11;

std::string place(int64_t row, int64_t node) {
  std::string text = "[";
  text.append(std::to_string(row)).append(", ").append(std::to_string(node)).append("]");
  return text;
}

// Tokens and uniforms of real nodes, on the CPU.
void check_sample_data(const Check& check, const VerifySamplesArgs& args) {
  for (int64_t row = 0; row < args.batch; ++row) {
    const int64_t length = args.lengths ? args.lengths[row] : args.nodes;
    for (int64_t node = 0; node <= args.nodes; ++node) {
      if (node >= length && node < args.nodes) continue;
      const float uniform = args.uniforms[row * args.uniforms_stride + node];
      if (!(uniform >= 0 && uniform <= 1)) {
        check.fail(PyExc_ValueError, ("uniforms" + place(row, node)).c_str(), "be in 0..1",
                   std::to_string(uniform));
      }
      if (node == args.nodes) continue;
      const int64_t token = args.drafted[row * args.drafted_stride + node];
      if (token < 0 || token >= args.vocab) {
        check.fail(PyExc_IndexError, ("drafted" + place(row, node)).c_str(),
                   "be in 0.." + std::to_string(args.vocab - 1), std::to_string(token));
      }
    }
  }
}

// Says what is wrong with the probabilities of a row that was refused.
[[noreturn]] void refuse_probs(const Check& check, const VerifySamplesArgs& args, int64_t row) {
  const int64_t length = args.lengths ? args.lengths[row] : args.nodes;
  int64_t empty = length;
  for (int64_t node = length; node >= 0; --node) {
    double sum = 0;
    for (const bool target : {true, false}) {
      if (!target && node == length) continue;
      const float* probs =
          target ? args.target_probs + row * args.target_stride[0] + node * args.target_stride[1]
                 : args.draft_probs + row * args.draft_stride[0] + node * args.draft_stride[1];
      for (int64_t token = 0; token < args.vocab; ++token) {
        if (!(probs[token] >= 0 && std::isfinite(probs[token]))) {
          const std::string name = target ? "target_probs" : "draft_probs";
          check.fail(PyExc_ValueError, (name + place(row, node)).c_str(),
                     "be finite and not negative", std::to_string(probs[token]));
        }
        if (target) sum += probs[token];
      }
    }
    if (sum == 0) empty = node;
  }
  check.fail(PyExc_ValueError, ("target_probs" + place(row, empty)).c_str(), "not be all zeros",
             "a sum of 0");
}

int64_t verify_samples(const TensorView& accepted, const TensorView& tokens,
                       const TensorView& workspace, const TensorView& drafted,
                       const TensorView& draft_probs, const TensorView& target_probs,
                       const TensorView& uniforms, const TensorView& lengths) {
  const Check check("verify_samples");
  check.tensor(drafted, "drafted", 2);
  check.tensor(target_probs, "target_probs", 3);
  VerifySamplesArgs args{};
  const int64_t batch = args.batch = drafted.size(0), nodes = args.nodes = drafted.size(1);
  const int64_t vocab = args.vocab = target_probs.size(2);
  constexpr DType kInt64 = DType::kInt64, kFloat32 = DType::kFloat32;
  check_rows(check, drafted, "drafted", kInt64, {batch, nodes}, drafted);
  check_rows(check, draft_probs, "draft_probs", kFloat32, {batch, nodes, vocab}, drafted);
  check_rows(check, target_probs, "target_probs", kFloat32, {batch, nodes + 1, vocab}, drafted);
  check_rows(check, uniforms, "uniforms", kFloat32, {batch, nodes + 1}, drafted);
  if (vocab == 0) {
    check.fail(PyExc_ValueError, "target_probs", "have a token", check.shape(target_probs));
  }
  args.drafted = drafted.data<int64_t>();
  args.drafted_stride = drafted.stride(0);
  args.draft_probs = draft_probs.data<float>();
  args.target_probs = target_probs.data<float>();
  for (int axis = 0; axis < 2; ++axis) {
    args.draft_stride[axis] = draft_probs.stride(axis);
    args.target_stride[axis] = target_probs.stride(axis);
  }
  args.uniforms = uniforms.data<float>();
  args.uniforms_stride = uniforms.stride(0);
  args.lengths = check_node_counts(check, lengths, batch, nodes, drafted);
  args.accepted = contiguous_rows<int64_t>(check, accepted, "accepted", kInt64, {batch}, drafted);
  args.tokens =
      contiguous_rows<int64_t>(check, tokens, "tokens", kInt64, {batch, nodes + 1}, drafted);
  if (batch == 0) return 0;
  const bool on_cpu = drafted.tensor.device.type == dlpack::kCpu;
  if (on_cpu) check_sample_data(check, args);
  const int64_t wanted = launch(
      check, "verify_samples", drafted, "drafted", workspace, [&] { cpu::verify_samples(args); },
      [] { return int64_t{0}; },
      [&](void*, int64_t, Stream stream) { cuda::verify_samples(args, stream); });
  for (int64_t row = 0; on_cpu && row < batch; ++row) {
    if (args.accepted[row] < 0) refuse_probs(check, args, row);
  }
  return wanted;
}

}  // namespace

void bind_verify_samples(py::module_& m) {
  m.def("verify_samples", &verify_samples, py::arg("accepted"), py::arg("tokens"),
        py::arg("workspace"), py::arg("drafted"), py::arg("draft_probs"), py::arg("target_probs"),
        py::arg("uniforms"), py::arg("lengths") = py::none());
}

}  // namespace adaptive
