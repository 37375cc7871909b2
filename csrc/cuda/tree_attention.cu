// tree_attention on CUDA: its launches, and its kernels for float32.

#include "tree_attention.cuh"

#include "decode_attention_fma.cuh"
#include "plan.h"

namespace adaptive::cuda {
namespace {

Work work_of(const DecodeAttentionArgs& a) { return {.op = "tree_attention", .keys = a.capacity}; }

}  // namespace

int64_t tree_attention_workspace_bytes(const DecodeAttentionArgs& args) {
  return workspace_bytes(work_of(args), args);
}

void tree_attention(const DecodeAttentionArgs& args, Stream stream) {
  if (is_empty(args)) return;
  const Work work = work_of(args);
  const TreeProblem p{make_problem(work, args)};
  attend(work.op, p, stream);
  merge_splits(work.op, p, stream);
}

}  // namespace adaptive::cuda
