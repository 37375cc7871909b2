// What the kernels of select_tokens share: the state of a line, which is one row and KV head, in
// the workspace, how a block reads its chunk of it, and how scores are ranked and measured.

#pragma once

#include <cmath>
#include <limits>

#include "../select_tokens.h"
#include "../simt/simt.h"

namespace adaptive::cuda {

constexpr int kSelectThreads = 512, kSelectWarps = kSelectThreads / 32;
constexpr int kAtOnce = 4;  // scores of a thread in flight
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
constexpr int kPasses = 3;  // 11, 11 and 10 bits of a key, from the highest
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

using Weight = unsigned long long;  // as atomicAdd wants it

/// What the kernels of one call tell each other about a line. The first sets all of it.
struct Line {
  int length, begin, end;  // keys [begin, end) are free to choose, the others forced
  int forced;              // keys chosen because of their place
  uint32_t refused;        // 1: a score or the length is invalid
  uint32_t largest;        // bits of the largest score; only where shares count
  Weight forced_weight;
  uint32_t arrived[kPasses];  // blocks that have added their histogram
  // The key at which the highest reach their number, and their weight: as many digits as passes
  // are done. `rest` of each is still to be reached among the keys that begin with these digits.
  uint32_t by_number, by_weight;
  uint32_t number_rest;
  Weight weight_rest;
  // The result: higher keys are chosen, and the first `equals` of those that equal it.
  uint32_t key;
  int equals;
};

/// How many of a chunk lie above the key, or are forced; and how many equal it.
struct Tally {
  int above, equal;
};

/// The argument of every kernel.
struct Selection {
  SelectTokensArgs args;
  Line* lines;      // [batch * kv_heads]
  uint32_t* bins;   // [batch * kv_heads, kBins]
  Weight* weights;  // the same, where shares count
  Tally* tallies;   // [batch * kv_heads, chunks]
  int chunks;       // blocks of a line
  int chunk;        // keys of each
};

/// Orders as the score does; -0 as 0.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

/// A score in units of 2^-32 times the largest, to nearest, ties to even.
__device__ __forceinline__ Weight weight_of(float score, uint32_t largest) {
  const double unit = static_cast<double>(__uint_as_float(largest)) * 0x1p-32;
  return unit > 0 ? static_cast<Weight>(rint(static_cast<double>(score) / unit)) : 0;
}

__device__ __forceinline__ const float* scores_of(const Selection& s, int line) {
  const SelectTokensArgs& a = s.args;
  return a.scores + line / a.kv_heads * a.scores_stride[0] + line % a.kv_heads * a.scores_stride[1];
}

/// Calls visit(position, score) for every score of the block's chunk that is not -inf.
template <class Visit>
__device__ __forceinline__ void visit_chunk(const Selection& s, int line, int length,
                                            const Visit& visit) {
  const float* scores = scores_of(s, line);
  const int first = static_cast<int>(blockIdx.x % s.chunks) * s.chunk;
  const int last = min(first + s.chunk, length);
  for (int i = first + static_cast<int>(threadIdx.x); i < last; i += kSelectThreads * kAtOnce) {
    float score[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int position = i + u * kSelectThreads;
      score[u] = position < last ? scores[position] : kMinusInfinity;
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (score[u] != kMinusInfinity) visit(i + u * kSelectThreads, score[u]);
    }
  }
}

/// The sum of `value` over the threads before this one, and, in `total`, over all. `scratch` holds
/// one value per warp; every thread of the block calls this.
template <class T>
__device__ __forceinline__ T sum_before(T value, T* scratch, T& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_sync(~0u, sum, lane - step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // whoever still reads the sums of the call before
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  T before = sum - value;
  total = 0;
#pragma unroll
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  return before;
}

}  // namespace adaptive::cuda
