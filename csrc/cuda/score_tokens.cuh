// Problems whose kernels also write every score, for score_tokens and scored_attention.

#pragma once

#include "../score_tokens.h"
#include "key_ring.cuh"

namespace adaptive::cuda {

/// Beside what Problem asks for, the score of each row and key is written: scaled, capped, biased,
/// -inf where the row does not see the key. Without values nothing else but lse is computed.
template <bool kWithValues>
struct ScoredProblem : Problem {
  static constexpr bool kValues = kWithValues, kLogits = true;

  float* logits;          // [batch, heads, query_tokens, logits_stride]
  int64_t logits_stride;  // the capacity, rounded up to whole tiles: tiles are written whole

  __device__ __forceinline__ float* logits_of(const Row& row) const {
    return logits + row.index(args) * logits_stride;
  }
};

inline constexpr int kMostTileKeys = 64;

/// Launch the tensor-core kernels, for the 2-byte element types.
void attend_half(const char* op, const ScoredProblem<false>& p, Stream stream);
void attend_half(const char* op, const ScoredProblem<true>& p, Stream stream);

/// Writes a warp's scores of 16 rows and 16 keys. Lane 4g + t holds rows g and g + 8 of the tile.
template <class P>
__device__ __forceinline__ void store_logits(const P& p, const Share& share,
                                             const float (&scores)[2][4], int row, int key) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Row at(p.args, share, row + 8 * i);
    if (!at.exists) continue;
    float* to = p.logits_of(at) + key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = {scores[j][2 * i], scores[j][2 * i + 1]};
    }
  }
}

}  // namespace adaptive::cuda
