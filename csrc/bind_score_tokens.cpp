// The bindings of score_tokens and scored_attention, which weigh every key of a cache.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_attention.h"
#include "score_tokens.h"

namespace adaptive {
namespace {

namespace py = pybind11;

Reduce reduction(const Check& check, const std::string& name) {
  if (name == "sum") return Reduce::kSum;
  if (name == "max") return Reduce::kMax;
  if (name == "logit") return Reduce::kLogit;
  check.fail(PyExc_ValueError, "reduce", "be sum, max or logit", name);
}

// Both ops: score_tokens has neither value nor out.
int64_t score(const Check& check, const char* op, const TensorView* out, const TensorView& lse,
              const TensorView& scores, const TensorView& workspace, const AttentionInputs& inputs,
              const std::string& reduce) {
  ScoreTokensArgs args{};
  args.attention = attention_args(check, inputs);
  args.reduce = reduction(check, reduce);
  const DecodeAttentionArgs& sizes = args.attention;
  set_attention_outputs(check, out, lse, inputs.query, args.attention);
  check_output(check, scores, "scores", {sizes.batch, sizes.kv_heads, sizes.capacity},
               inputs.query);
  check.contiguous(scores, "scores");
  args.scores = scores.data<float>();
  if (lse.numel() == 0 && scores.numel() == 0) return 0;
  return launch(
      check, op, inputs.query, "query", workspace, [&] { cpu::score_tokens(args); },
      [&] { return cuda::score_tokens_workspace_bytes(args); },
      [&](void* memory, int64_t bytes, Stream stream) {
        args.workspace = memory;
        args.workspace_bytes = bytes;
        cuda::score_tokens(args, stream);
      });
}

int64_t score_tokens(const TensorView& scores, const TensorView& lse, const TensorView& workspace,
                     const TensorView& query, const TensorView& key, const TensorView& lengths,
                     const TensorView& mask, py::handle scale, py::handle softcap,
                     py::handle causal, const std::string& reduce) {
  return score(Check("score_tokens"), "score_tokens", nullptr, lse, scores, workspace,
               {query, key, nullptr, lengths, mask, scale, softcap, causal}, reduce);
}

int64_t scored_attention(const TensorView& out, const TensorView& lse, const TensorView& scores,
                         const TensorView& workspace, const TensorView& query,
                         const TensorView& key, const TensorView& value, const TensorView& lengths,
                         const TensorView& mask, py::handle scale, py::handle softcap,
                         py::handle causal, const std::string& reduce) {
  return score(Check("scored_attention"), "scored_attention", &out, lse, scores, workspace,
               {query, key, &value, lengths, mask, scale, softcap, causal}, reduce);
}

}  // namespace

void bind_score_tokens(py::module_& m) {
  m.def("score_tokens", &score_tokens, py::arg("scores"), py::arg("lse"), py::arg("workspace"),
        py::arg("query"), py::arg("key"), py::arg("lengths") = py::none(),
        py::arg("mask") = py::none(), py::arg("scale") = py::none(), py::arg("softcap") = 0.0,
        py::arg("causal") = true, py::arg("reduce") = "sum");
  m.def("scored_attention", &scored_attention, py::arg("out"), py::arg("lse"), py::arg("scores"),
        py::arg("workspace"), py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("lengths") = py::none(), py::arg("mask") = py::none(),
        py::arg("scale") = py::none(), py::arg("softcap") = 0.0, py::arg("causal") = true,
        py::arg("reduce") = "sum");
}

}  // namespace adaptive
