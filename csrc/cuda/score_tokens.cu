// score_tokens and scored_attention on CUDA: their launches, their kernels for float32, and the
// kernel that reduces the scores of all rows to one number per key.

#include "score_tokens.cuh"

#include "decode_attention_fma.cuh"
#include "plan.h"

namespace adaptive::cuda {
namespace {

constexpr int kReduceThreads = 256;

/// The argument of reduce_scores. Rows of one KV head lie behind one another in logits and lse.
struct Reduction {
  const float* logits;  // [batch, kv_heads, rows, logits_stride]
  const float* lse;     // [batch, kv_heads, rows]
  const int32_t* lengths;
  float* scores;  // [batch, kv_heads, capacity]
  int64_t logits_stride, capacity, kv_heads;
  int rows;    // of a KV head
  int chunks;  // blocks of a KV head
  Reduce reduce;
};

/// Adds one row's score to what the rows before made of a key. `made` is -inf as long as no row
/// saw the key; NaN stays.
template <Reduce kReduce>
__device__ __forceinline__ float combine(float made, float logit, float lse) {
  if (logit == -kInfinity) return made;
  const float x = kReduce == Reduce::kLogit ? logit : expf(logit - lse);
  if (made == -kInfinity) return x;
  if (kReduce == Reduce::kSum) return made + x;
  return x > made || x != x ? x : made;
}

template <Reduce kReduce>
__device__ __forceinline__ float reduce_rows(const Reduction& r, const float* logits,
                                             const float* lse) {
  float made = -kInfinity;
#pragma unroll 4
  for (int row = 0; row < r.rows; ++row) {
    made = combine<kReduce>(made, logits[row * r.logits_stride], lse[row]);
  }
  return made;
}

/// A thread owns a key of a KV head; neighbours read neighbours.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_scores(const __grid_constant__ Reduction r) {
  const int64_t head = blockIdx.x / r.chunks;  // of all batches
  const int64_t key = int64_t{blockIdx.x % r.chunks} * kReduceThreads + threadIdx.x;
  if (key >= r.capacity) return;
  const int64_t length = r.lengths ? r.lengths[head / r.kv_heads] : r.capacity;
  float made = -kInfinity;
  if (length < 0 || length > r.capacity) {
    made = kNaN;
  } else if (key < length) {
    const float* logits = r.logits + head * r.rows * r.logits_stride + key;
    const float* lse = r.lse + head * r.rows;
    switch (r.reduce) {
      case Reduce::kSum: made = reduce_rows<Reduce::kSum>(r, logits, lse); break;
      case Reduce::kMax: made = reduce_rows<Reduce::kMax>(r, logits, lse); break;
      default: made = reduce_rows<Reduce::kLogit>(r, logits, lse);
    }
  }
  r.scores[head * r.capacity + key] = made;
}

int64_t logits_stride(const DecodeAttentionArgs& a) {
  return (a.capacity + kMostTileKeys - 1) / kMostTileKeys * kMostTileKeys;
}

Work work_of(const DecodeAttentionArgs& a) {
  return {.op = a.value ? "scored_attention" : "score_tokens",
          .keys = a.capacity,
          .values = a.value != nullptr,
          .row_bytes = logits_stride(a) * int64_t{4}};
}

template <bool kWithValues>
void attend_scored(const Work& work, const DecodeAttentionArgs& a, Stream stream) {
  ScoredProblem<kWithValues> p{make_problem(work, a)};
  p.logits = static_cast<float*>(a.workspace);
  p.logits_stride = logits_stride(a);
  attend(work.op, p, stream);
  merge_splits(work.op, p, stream);
}

}  // namespace

int64_t score_tokens_workspace_bytes(const ScoreTokensArgs& args) {
  return workspace_bytes(work_of(args.attention), args.attention);
}

void score_tokens(const ScoreTokensArgs& args, Stream stream) {
  DecodeAttentionArgs a = args.attention;
  a.workspace = args.workspace;
  a.workspace_bytes = args.workspace_bytes;
  const Work work = work_of(a);
  if (!is_empty(a)) {
    if (work.values) {
      attend_scored<true>(work, a, stream);
    } else {
      attend_scored<false>(work, a, stream);
    }
  }

  const int64_t chunks = (a.capacity + kReduceThreads - 1) / kReduceThreads;
  const int64_t blocks = a.batch * a.kv_heads * chunks;
  if (blocks == 0) return;
  if (blocks > INT32_MAX) refuse(work.op, "batch must be smaller: too many thread blocks");
  Reduction r{};
  r.logits = static_cast<const float*>(a.workspace);
  r.lse = a.lse;
  r.lengths = a.lengths;
  r.scores = args.scores;
  r.logits_stride = logits_stride(a);
  r.capacity = a.capacity;
  r.kv_heads = a.kv_heads;
  r.rows = static_cast<int>(a.heads / a.kv_heads * a.query_tokens);
  r.chunks = static_cast<int>(chunks);
  r.reduce = args.reduce;
  simt::launch<reduce_scores>(work.op, dim3(static_cast<unsigned>(blocks)), dim3(kReduceThreads), 0,
                              stream, r);
}

}  // namespace adaptive::cuda
