// score_tokens and scored_attention for the 2-byte element types: one tensor-core kernel per type,
// head size and op.

#include "decode_attention_mma.cuh"

namespace adaptive::cuda {

void attend_half(const char* op, const ScoredProblem<false>& p, Stream stream) {
  launch_mma(op, p, stream);
}
void attend_half(const char* op, const ScoredProblem<true>& p, Stream stream) {
  launch_mma(op, p, stream);
}

}  // namespace adaptive::cuda
