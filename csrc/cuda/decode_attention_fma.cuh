// decode_attention on CUDA cores, for float32: 16 query rows against 32 keys (16 for wide heads).
//
// A tile goes through two phases with a barrier between. Scores: a lane owns a key and up to four
// rows; the lanes of a row share its softmax. Output: a thread owns columns and up to 16 rows.

#pragma once

#include "key_ring.cuh"
#include "plan.h"
#include "score_tokens.cuh"

namespace adaptive::cuda {

template <int D>
struct FmaShape {
  static constexpr int kKeys = D > 128 ? 16 : 32;
  static constexpr int kRowsAtOnce = kThreads / kKeys;              // of scores
  static constexpr int kPasses = kTileRows / kRowsAtOnce;           // rows of a lane
  static constexpr int kColumns = D > kThreads ? D / kThreads : 1;  // of a thread
  static constexpr int kRowGroups = D < kThreads ? kThreads / D : 1;
  static constexpr int kRows = kTileRows / kRowGroups;  // of a thread
};

/// The query rows, what the score phase hands to the output phase, and the softmax state.
template <int D>
struct FmaTile {
  float query[kTileRows][D];
  float weights[kTileRows][FmaShape<D>::kKeys];
  float scale[kTileRows];  // of the output so far
  float max[kTileRows];
  float sum[kTileRows];
};

constexpr int fma_tile_keys(int padded_head_dim) {
  return padded_head_dim > 128 ? FmaShape<256>::kKeys : FmaShape<128>::kKeys;
}
constexpr int fma_tile_bytes(int padded_head_dim) {
  return padded_head_dim > 128  ? sizeof(FmaTile<256>)
         : padded_head_dim > 64 ? sizeof(FmaTile<128>)
                                : sizeof(FmaTile<64>);
}

template <int D>
__device__ __forceinline__ float dot(const float* query, const float* key) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
  for (int c = 0; c < D; c += 4) {
    const float4 q = *reinterpret_cast<const float4*>(query + c);
    const float4 k = *reinterpret_cast<const float4*>(key + c);
    sum.x += q.x * k.x;
    sum.y += q.y * k.y;
    sum.z += q.z * k.z;
    sum.w += q.w * k.w;
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

/// Reduces over the kKeys lanes that share a row.
template <int kKeys, class Reduce>
__device__ __forceinline__ float reduce(float x, Reduce combine) {
#pragma unroll
  for (int lanes = kKeys / 2; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

/// Scores and online softmax of one tile. `sight`, `max` and `sum` belong to the rows of this lane.
template <int D, class P>
__device__ __forceinline__ void score_tile(const P& p, const Share& share,
                                           const typename P::Keys& keys, FmaTile<D>& tile,
                                           const float* key_rows, int first,
                                           const SightOf<P> (&sight)[FmaShape<D>::kPasses],
                                           float (&max)[FmaShape<D>::kPasses],
                                           float (&sum)[FmaShape<D>::kPasses]) {
  using S = FmaShape<D>;
  const int key = threadIdx.x % S::kKeys;
#pragma unroll
  for (int pass = 0; pass < S::kPasses; ++pass) {
    if (pass * S::kRowsAtOnce >= share.rows) break;
    const int row = pass * S::kRowsAtOnce + threadIdx.x / S::kKeys;
    const float product = dot<D>(tile.query[row], key_rows + key * Ring<float, D, P>::kStride);
    const float x = keys.see(p, share, sight[pass], score(p.args, product), first, key);
    if constexpr (P::kLogits) {
      const Row at(p.args, share, row);
      if (at.exists) p.logits_of(at)[first + key] = x;
    }
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    const auto plus = [](float a, float b) { return a + b; };
    const float top = fmaxf(max[pass], reduce<S::kKeys>(x, larger));
    const float w = weight(x, top), scale = weight(max[pass], top);
    sum[pass] = sum[pass] * scale + reduce<S::kKeys>(w, plus);
    max[pass] = top;
    tile.weights[row][key] = w;
    if (key == 0) tile.scale[row] = scale;
  }
}

/// Adds one tile to the output of this thread's rows and columns. A key without weight adds
/// nothing, whatever its value.
template <int D, int kStride>
__device__ __forceinline__ void add_tile(int rows, const FmaTile<D>& tile, const float* values,
                                         float (&out)[FmaShape<D>::kRows][FmaShape<D>::kColumns]) {
  using S = FmaShape<D>;
  const int column = threadIdx.x % D, row_group = threadIdx.x / D;
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
    const int row = r * S::kRowGroups + row_group;
    if (row >= rows) continue;
    const float scale = tile.scale[row];
#pragma unroll
    for (int c = 0; c < S::kColumns; ++c) out[r][c] *= scale;
  }
  for (int k = 0; k < S::kKeys; k += 4) {
    float value[4][S::kColumns];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int c = 0; c < S::kColumns; ++c) {
        value[j][c] = values[(k + j) * kStride + column + c * kThreads];
      }
    }
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      const int row = r * S::kRowGroups + row_group;
      if (row >= rows) continue;
      const float4 four = *reinterpret_cast<const float4*>(&tile.weights[row][k]);
      const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < S::kColumns; ++c) {
          out[r][c] = w[j] == 0.0f ? out[r][c] : out[r][c] + w[j] * value[j][c];
        }
      }
    }
  }
}

template <int D, class P>
__global__ void __launch_bounds__(kThreads, 2) attend_fma(const __grid_constant__ P p) {
  using S = FmaShape<D>;
  const DecodeAttentionArgs& a = p.args;
  const Plan& plan = p.plan;
  const Share share(p);
  if (share.begin >= share.end) return write_empty_rows(p, share);

  DYN_SHARED(float, shared);
  FmaTile<D>& tile = *reinterpret_cast<FmaTile<D>*>(shared);
  const Ring<float, D, P> ring{shared + sizeof(FmaTile<D>) / sizeof(float)};
  typename P::Keys keys(p, share, ring.end(plan));
  keys.start(p, share);
  for (int stage = 0; stage < plan.stages - 1; ++stage) {
    ring.load(p, share, keys, stage, share.begin + stage * S::kKeys);
  }
  for (int i = threadIdx.x / kLanes; i < kTileRows; i += kWarps) {
    const Row row(a, share, i);
    const float* query = static_cast<const float*>(a.query) + row.offset(a.query_stride);
    for (int c = threadIdx.x % kLanes; c < D; c += kLanes) {
      tile.query[i][c] = row.exists && c < a.head_dim ? query[c] : 0.0f;
    }
  }

  SightOf<P> sight[S::kPasses];
  float max[S::kPasses], sum[S::kPasses] = {}, out[S::kRows][S::kColumns] = {};
#pragma unroll
  for (int pass = 0; pass < S::kPasses; ++pass) {
    max[pass] = -kInfinity;
    sight[pass] =
        keys.sight(p, share, Row(a, share, pass * S::kRowsAtOnce + threadIdx.x / S::kKeys));
  }

  int stage = 0, spare = plan.stages - 1;
  for (int first = share.begin; first < share.end; first += S::kKeys) {
    const int ahead = first + (plan.stages - 1) * S::kKeys;
    keys.publish(p, share, ahead);
    Ring<float, D, P>::wait(plan);
    __syncthreads();
    ring.load(p, share, keys, spare, ahead);
    keys.fetch(p, share, ahead + S::kKeys);
    score_tile(p, share, keys, tile, ring.keys(plan, stage), first, sight, max, sum);
    if constexpr (P::kValues) {
      __syncthreads();
      add_tile<D, Ring<float, D, P>::kStride>(share.rows, tile, ring.values(plan, stage), out);
    }
    spare = stage;
    stage = stage + 1 == plan.stages ? 0 : stage + 1;
  }

  simt::cp_async_wait<0>();
  __syncthreads();  // from here on the query tile holds the output
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < S::kColumns; ++c) {
      tile.query[r * S::kRowGroups + threadIdx.x / D][threadIdx.x % D + c * kThreads] = out[r][c];
    }
  }
#pragma unroll
  for (int pass = 0; pass < S::kPasses; ++pass) {
    const int row = pass * S::kRowsAtOnce + threadIdx.x / S::kKeys;
    if (threadIdx.x % S::kKeys != 0) continue;
    tile.max[row] = max[pass];
    tile.sum[row] = sum[pass];
  }
  __syncthreads();
  write_rows(p, share, keys.good(), 1, tile.query[0], D, tile.max, tile.sum);
}

/// Launches the kernel for the element type and head size of the problem.
template <class P>
void attend(const char* op, const P& p, Stream stream) {
  if (p.args.dtype != DType::kFloat32) return attend_half(op, p, stream);
  with_head_dim(p.plan, [&]<int D>() {
    simt::launch<attend_fma<D, P>>(op, attend_grid(p), dim3(kThreads), p.plan.shared_bytes, stream,
                                   p);
  });
}

}  // namespace adaptive::cuda
