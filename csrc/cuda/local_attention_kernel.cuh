// The kernel of local_attention: a warp's 16 queries against tiles of keys, with the online softmax
// of FlashAttention-2 (Dao 2023, arXiv 2307.08691).
//
// Two tiles of keys and values lie in shared memory: while the warps of a block work on one, each
// at its own pace, the other is on its way. Scores and output stay in registers. Scores are in
// base 2.

#pragma once

#include "local_attention_products.cuh"
#include "vector.cuh"

namespace adaptive::cuda {

/// Starts copying the tile of steps `first_step`.. to shared memory, keys, then values; zeros for
/// keys that no query of the block sees, so that what they hold has no effect.
template <class T, int D>
__device__ __forceinline__ void load_tile(const LocalProblem& p, const QueryTile& tile,
                                          const LocalShared& shared, int first_step, T* to) {
  using S = LocalShape<T, D>;
  constexpr int kWidth = D / S::kVector;
  const LocalAttentionArgs& a = p.args;
  const T* keys =
      static_cast<const T*>(a.key) + tile.batch * a.key_stride[0] + tile.kv_head * a.key_stride[1];
  const T* values = static_cast<const T*>(a.value) + tile.batch * a.value_stride[0] +
                    tile.kv_head * a.value_stride[1];
  const Steps steps = shared.steps;
  const Reach reach = shared.reach;
  if (p.wide) {
#pragma unroll 2
    for (int i = threadIdx.x; i < S::kKeys * kWidth; i += blockDim.x) {
      const int r = i / kWidth, column = i % kWidth * S::kVector;
      const int at = steps[first_step + r / kStep] + r % kStep;
      const bool valid = reach.holds(at) && column < a.head_dim;
      const int64_t row = valid ? at : 0;
      T* slot = to + r * S::kStride + column;
      simt::cp_async16(slot, keys + row * a.key_stride[2] + column, valid);
      simt::cp_async16(slot + S::kKeys * S::kStride, values + row * a.value_stride[2] + column,
                       valid);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kKeys * D; i += blockDim.x) {
      const int r = i / D, column = i % D;
      const int at = steps[first_step + r / kStep] + r % kStep;
      const bool valid = reach.holds(at) && column < a.head_dim;
      T* slot = to + r * S::kStride + column;
      *slot = valid ? keys[at * a.key_stride[2] + column] : T{};
      slot[S::kKeys * S::kStride] = valid ? values[at * a.value_stride[2] + column] : T{};
    }
  }
}

/// Copies the warp's queries to shared memory, zeros where there are none. A barrier must follow.
template <class T, int D>
__device__ __forceinline__ void stage_queries(const LocalProblem& p, const QueryTile& tile, T* to) {
  using S = LocalShape<T, D>;
  const LocalAttentionArgs& a = p.args;
  const T* query = static_cast<const T*>(a.query) + tile.batch * a.query_stride[0] +
                   tile.head * a.query_stride[1];
  for (int i = threadIdx.x % kLanes; i < kStep * D / S::kVector; i += kLanes) {
    const int row = i / (D / S::kVector), column = i % (D / S::kVector) * S::kVector;
    Vector<T> x{};
    if (row < tile.existing && column < a.head_dim) {
      x = load(query + (tile.token + row) * a.query_stride[2] + column, p.wide_query);
    }
    *reinterpret_cast<Vector<T>*>(to + row * S::kStride + column) = x;
  }
}

/// Makes scores, in base 2, of products.
template <int kCount>
__device__ __forceinline__ void scale_scores(const LocalProblem& p, float (&scores)[kCount][4]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[j][e] *= p.factor;
  }
  if (p.cap == 0.0f) return;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[j][e] = p.cap * tanhf(scores[j][e] / p.args.softcap);
  }
}

/// Leaves out those keys of the step from `first` on that a query does not see.
__device__ __forceinline__ void exclude(const LocalSight* sights, int first, float (&left)[4],
                                        float (&right)[4]) {
  const int row = threadIdx.x % kLanes / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const LocalSight sight = sights[row + 8 * i];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int key = first + pair + e;
      if (!sight.sees(key)) left[2 * i + e] = -kInfinity;
      if (!sight.sees(key + 8)) right[2 * i + e] = -kInfinity;
    }
  }
}

/// 2^(x - max), where max = -inf stands for "nothing seen yet" and x <= max.
__device__ __forceinline__ float weight2(float x, float max) {
  return simt::exp2_approx(x - (max == -kInfinity ? 0.0f : max));
}

/// Online softmax over a tile: scores become weights relative to the new maxima.
template <int kKeys, int D>
__device__ __forceinline__ void local_softmax(float (&scores)[kKeys / 8][4], WarpRows<D>& rows) {
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = rows.max[i];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      top = fmaxf(top, fmaxf(scores[j][2 * i], scores[j][2 * i + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    scale[i] = weight2(rows.max[i], top);
    rows.max[i] = top;
    rows.sum[i] *= scale[i];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        scores[j][e] = weight2(scores[j][e], top);
        rows.sum[i] += scores[j][e];
      }
    }
  }
  // Maxima settle soon: most tiles leave the output as it is.
  if (__ballot_sync(~0u, scale[0] != 1.0f || scale[1] != 1.0f) == 0) return;
#pragma unroll
  for (int c = 0; c < D / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.out[c][i] *= scale[i / 2];
  }
}

/// Writes the warp's rows to out and lse; NaN if data on the device was out of range.
template <class T, int D>
__device__ __forceinline__ void write_results(const LocalProblem& p, const QueryTile& tile,
                                              bool bad, const WarpRows<D>& rows, T* staged) {
  using S = LocalShape<T, D>;
  const LocalAttentionArgs& a = p.args;
  const int lane = threadIdx.x % kLanes, pair = lane % 4;
  __syncwarp();  // the queries are not needed any more
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    float sum = rows.sum[i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (bad) sum = kNaN;
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      T* to = staged + row * S::kStride + c * 8 + 2 * pair;
      const float x = sum == 0.0f ? 0.0f : rows.out[c][2 * i] * inverse;
      const float y = sum == 0.0f ? 0.0f : rows.out[c][2 * i + 1] * inverse;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float2*>(to) = {x, y};
      } else {
        *reinterpret_cast<uint32_t*>(to) = simt::pack2<T>(x, y);
      }
    }
    if (pair == 0 && row < tile.existing) {
      constexpr float kLn2 = 0.693147180559945f;
      float* lse = a.lse + (tile.batch * a.heads + tile.head) * a.query_tokens + tile.token;
      lse[row] = sum == 0.0f ? -kInfinity : rows.max[i] * kLn2 + logf(sum);
    }
  }
  __syncwarp();
  T* out = static_cast<T*>(a.out) + tile.batch * a.out_stride[0] + tile.head * a.out_stride[1];
  const int vectors = static_cast<int>(a.head_dim) / S::kVector;
  for (int i = lane; i < kStep * vectors; i += kLanes) {
    const int row = i / vectors, column = i % vectors * S::kVector;
    if (row >= tile.existing) break;
    T* to = out + (tile.token + row) * a.out_stride[2] + column;
    const Vector<T> x = load(staged + row * S::kStride + column, true);
    if (p.wide_out) {
      *reinterpret_cast<Vector<T>*>(to) = x;
    } else {
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) to[e] = x.x[e];
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kMostWarps* kLanes, sizeof(T) * D <= 128 ? 2 : 1)
    attend_local(const __grid_constant__ LocalProblem p) {
  using S = LocalShape<T, D>;
  const LocalAttentionArgs& a = p.args;
  const QueryTile tile(p);
  const BlockList list(a, tile);
  DYN_SHARED(unsigned char, bytes);
  LocalShared& shared = *reinterpret_cast<LocalShared*>(bytes);
  T* const queries = reinterpret_cast<T*>(bytes + sizeof(LocalShared));
  T* const ring = queries + blockDim.x / kLanes * kStep * S::kStride;  // [2, 2, kKeys, kStride]
  const int warp = threadIdx.x / kLanes;

  T* const own = queries + warp * kStep * S::kStride;
  look(p, tile, is_bad(a, tile, list), shared);
  __syncthreads();
  plan_steps(p, list, shared);
  stage_queries<T, D>(p, tile, own);
  __syncthreads();
  const int steps = shared.steps.count;
  if (steps > 0) load_tile<T, D>(p, tile, shared, 0, ring);
  simt::cp_async_commit();

  const Products<T, D> products(own);
  WarpRows<D> rows;
  T* now = ring;
  T* next = ring + 2 * S::kKeys * S::kStride;
  for (int first = 0; first < steps; first += S::kSteps) {
    simt::cp_async_wait<0>();
    __syncthreads();  // the tile is here, and the one before is not needed any more
    if (first + S::kSteps < steps) load_tile<T, D>(p, tile, shared, first + S::kSteps, next);
    simt::cp_async_commit();

    const Reach mine = shared.reaches[warp];
    int at[S::kSteps];
    bool seen = false;
#pragma unroll
    for (int s = 0; s < S::kSteps; ++s) {
      at[s] = shared.steps[first + s];
      seen = seen || mine.touches(at[s]);
    }
    if (seen) {
      float scores[S::kKeys / 8][4] = {};
      products.scores(scores, now);
      scale_scores(p, scores);
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
        if (mine.covers(at[s])) continue;
        exclude(shared.sights + warp * kStep, at[s], scores[2 * s], scores[2 * s + 1]);
      }
      local_softmax<S::kKeys>(scores, rows);
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
        if (!mine.touches(at[s])) continue;
        products.add(rows.out, scores[2 * s], scores[2 * s + 1],
                     now + (S::kKeys + s * kStep) * S::kStride);
      }
    }
    T* const used = now;
    now = next;
    next = used;
  }
  simt::cp_async_wait<0>();
  write_results<T, D>(p, tile, shared.reach.bad, rows, own);
}

/// Calls run.template operator()<D>() for the padded head size.
template <class Run>
void with_local_head_dim(const LocalAttentionArgs& a, const Run& run) {
  Plan plan{};
  plan.padded_head_dim = a.head_dim <= 64 ? 64 : a.head_dim <= 128 ? 128 : 256;
  with_head_dim(plan, run);
}

/// Launches the kernel for one element type and head size.
template <class T, int D>
void launch_local(const LocalProblem& p, dim3 grid, int warps, Stream stream) {
  simt::launch<attend_local<T, D>>("local_attention", grid, dim3(warps * kLanes),
                                   LocalShape<T, D>::shared_bytes(warps), stream, p);
}

}  // namespace adaptive::cuda
