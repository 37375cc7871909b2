// tree_attention for the 2-byte element types: one tensor-core kernel per type and head size.

#include "decode_attention_mma.cuh"
#include "tree_attention.cuh"

namespace adaptive::cuda {

void attend_half(const char* op, const TreeProblem& p, Stream stream) { launch_mma(op, p, stream); }

}  // namespace adaptive::cuda
