// decode_attention on tensor cores, for 2-byte elements: 16 query rows at a time against 16 keys.
//
// Warps share the ring of keys and values. Warp w works on row tile w % row_tiles and takes every
// (4 / row_tiles)-th group of 16 keys, with its own running maximum, sum and output in registers;
// the warps of a row tile are merged once, at the end. The online softmax is that of
// FlashAttention-2 (Dao 2023, arXiv 2307.08691), but its weights enter the second product as the
// sum of two elements instead of one, so that results are good to 2^-17 at least: tensor cores have
// time to spare here.

#pragma once

#include "key_ring.cuh"
#include "plan.h"
#include "score_tokens.cuh"

namespace adaptive::cuda {

inline constexpr int kKeys = 16;  // keys of one step of a warp

/// One warp's part of the fragments. Lane 4g + t holds rows g (i = 0) and g + 8 (i = 1).
template <int D>
struct WarpRows {
  float out[D / 8][4] = {};  // columns 2t, 2t + 1 of each 8: row g, row g, row g + 8, row g + 8
  float max[2] = {-kInfinity, -kInfinity};
  float sum[2] = {};  // of this lane's own keys
};

/// Where lane i points ldmatrix: row i % 16 of a 16 x 16 tile, at its left or right half.
template <int kStride>
__device__ __forceinline__ int tile_offset() {
  const int lane = threadIdx.x % kLanes;
  return lane % 16 * kStride + lane / 16 * 8;
}

/// Adds the mask to the scores of 16 keys; -inf where a row does not see a key.
template <class P>
__device__ __forceinline__ void exclude(const P& p, const Share& share,
                                        const typename P::Keys& keys, float (&scores)[2][4],
                                        const SightOf<P> (&sight)[2], int first, int k) {
  const int pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[j][i] =
          keys.see(p, share, sight[i / 2], scores[j][i], first, k + 8 * j + pair + i % 2);
    }
  }
}

/// For the two registers of a value fragment: the bits of those keys that some row gives weight.
__device__ __forceinline__ void weighted_keys(const float (&p)[2][4], uint32_t (&keep)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    keep[j] = (p[j][0] != 0.0f || p[j][2] != 0.0f ? 0x0000ffffu : 0u) |
              (p[j][1] != 0.0f || p[j][3] != 0.0f ? 0xffff0000u : 0u);
#pragma unroll
    for (int lanes = 4; lanes < kLanes; lanes *= 2) {
      keep[j] |= __shfl_xor_sync(~0u, keep[j], lanes);
    }
  }
}

/// Online softmax: scores become weights relative to the new maximum, `rows` is rescaled to it.
template <int D>
__device__ __forceinline__ void softmax(float (&scores)[2][4], WarpRows<D>& rows) {
  float scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float top = fmaxf(fmaxf(scores[0][2 * i], scores[0][2 * i + 1]),
                      fmaxf(scores[1][2 * i], scores[1][2 * i + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    top = fmaxf(top, rows.max[i]);
    scale[i] = weight(rows.max[i], top);
    rows.max[i] = top;
    rows.sum[i] *= scale[i];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        scores[j][e] = weight(scores[j][e], top);
        rows.sum[i] += scores[j][e];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < D / 8; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.out[c][i] *= scale[i / 2];
  }
}

/// The query fragments of a warp: in registers where they fit beside the output, else fetched from
/// shared memory at every use.
template <class T, int D>
struct Query {
  static constexpr bool kInRegisters = D <= 128;
  const T* shared;
  uint32_t held[kInRegisters ? D / 16 : 1][4];

  __device__ __forceinline__ explicit Query(const T* shared) : shared(shared) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int c = 0; c < D / 16; ++c) simt::ldmatrix_x4(held[c], shared + c * 16);
    }
  }
  __device__ __forceinline__ void get(int c, uint32_t (&to)[4]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = held[c][i];
    } else {
      simt::ldmatrix_x4(to, shared + c * 16);
    }
  }
};

/// 16 rows x 16 keys of float32 scores: query tile times keys.
template <class T, int D>
__device__ __forceinline__ void multiply_keys(float (&scores)[2][4], const Query<T, D>& query,
                                              const T* keys) {
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    uint32_t q[4], key[4];  // keys 0..7 and 8..15 at the left half of the columns, then the right
    query.get(c, q);
    simt::ldmatrix_x4(key, keys + c * 16);
    simt::mma_m16n8k16<T>(scores[0], q, key[0], key[2]);
    simt::mma_m16n8k16<T>(scores[1], q, key[1], key[3]);
  }
}

/// Two weights as operands of T: `low` holds what rounding to `high` lost.
template <class T>
__device__ __forceinline__ void split(float a, float b, uint32_t& high, uint32_t& low) {
  high = simt::pack2<T>(a, b);
  low = simt::pack2<T>(a - simt::to_float(simt::from_float<T>(a)),
                       b - simt::to_float(simt::from_float<T>(b)));
}

/// rows.out += weights * values. The accumulator layout of `p` is the operand layout of the next
/// product, so the weights never leave the registers.
template <class T, int D>
__device__ __forceinline__ void multiply_values(WarpRows<D>& rows, const float (&p)[2][4],
                                                const uint32_t (&keep)[2], const T* values) {
  uint32_t high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    split<T>(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1], high[i], low[i]);
  }
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    uint32_t value[4];  // keys 0..7 and 8..15 of columns 0..7, then of columns 8..15
    simt::ldmatrix_x4<true>(value, values + c * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = value[2 * i] & keep[0], second = value[2 * i + 1] & keep[1];
      simt::mma_m16n8k16<T>(rows.out[2 * c + i], high, first, second);
      simt::mma_m16n8k16<T>(rows.out[2 * c + i], low, first, second);
    }
  }
}

/// Copies the block's query rows to shared memory, zeros where there are none.
template <class T, int D, class P>
__device__ __forceinline__ void stage_query(const P& p, const Share& share, T* to) {
  const DecodeAttentionArgs& a = p.args;
  for (int i = threadIdx.x / kLanes; i < p.plan.row_tiles * kTileRows; i += kWarps) {
    const Row row(a, share, i);
    const T* query = static_cast<const T*>(a.query) + row.offset(a.query_stride);
    for (int c = threadIdx.x % kLanes; c < D; c += kLanes) {
      to[i * Ring<T, D, P>::kStride + c] = row.exists && c < a.head_dim ? query[c] : T{};
    }
  }
}

/// Leaves a warp's fragments in shared memory as rows, see write_rows.
template <bool kValues, int D>
__device__ __forceinline__ void stage_rows(const WarpRows<D>& rows, float* out, float* max,
                                           float* sum) {
  const int lane = threadIdx.x % kLanes, group = lane / 4, pair = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = group + 8 * i;
    float total = rows.sum[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (pair == 0) max[row] = rows.max[i];
    if (pair == 0) sum[row] = total;
    if constexpr (kValues) {
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        out[row * D + c * 8 + 2 * pair] = rows.out[c][2 * i];
        out[row * D + c * 8 + 2 * pair + 1] = rows.out[c][2 * i + 1];
      }
    }
  }
}

template <class T, int D, class P>
__global__ void __launch_bounds__(kThreads, D <= 128 ? 2 : 1)
    attend_mma(const __grid_constant__ P p) {
  const DecodeAttentionArgs& a = p.args;
  const Plan& plan = p.plan;
  const Share share(p);
  if (share.begin >= share.end) return write_empty_rows(p, share);

  constexpr int kStride = Ring<T, D, P>::kStride;
  DYN_SHARED(T, staged);  // query rows, then the ring, then what P::Keys keeps
  const Ring<T, D, P> ring{staged + plan.row_tiles * kTileRows * kStride};
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int row_tile = warp % plan.row_tiles, key_group = warp / plan.row_tiles;
  const int key_groups = kWarps / plan.row_tiles;

  typename P::Keys keys(p, share, ring.end(plan));
  keys.start(p, share);
  for (int stage = 0; stage < plan.stages - 1; ++stage) {
    ring.load(p, share, keys, stage, share.begin + stage * plan.tile_keys);
  }

  stage_query<T, D>(p, share, staged);
  __syncthreads();
  const int offset = tile_offset<kStride>();
  const Query<T, D> query(staged + row_tile * kTileRows * kStride + offset);

  const int row = row_tile * kTileRows + lane / 4;
  const SightOf<P> sight[2] = {keys.sight(p, share, Row(a, share, row)),
                               keys.sight(p, share, Row(a, share, row + 8))};
  const int common = keys.common(p, share);

  WarpRows<D> rows;
  int stage = 0, spare = plan.stages - 1;
  for (int first = share.begin; first < share.end; first += plan.tile_keys) {
    const int ahead = first + (plan.stages - 1) * plan.tile_keys;
    keys.publish(p, share, ahead);
    Ring<T, D, P>::wait(plan);
    __syncthreads();
    ring.load(p, share, keys, spare, ahead);
    keys.fetch(p, share, ahead + plan.tile_keys);

    for (int k = key_group * kKeys; k < plan.tile_keys; k += key_groups * kKeys) {
      if (first + k >= share.end) break;
      float p_tile[2][4] = {};
      multiply_keys<T, D>(p_tile, query, ring.keys(plan, stage) + k * kStride + offset);
#pragma unroll
      for (int i = 0; i < 8; ++i) p_tile[i / 4][i % 4] = score(a, p_tile[i / 4][i % 4]);
      if (first + k + kKeys > common) exclude(p, share, keys, p_tile, sight, first, k);
      if constexpr (P::kLogits) store_logits(p, share, p_tile, row, first + k);
      softmax(p_tile, rows);
      if constexpr (P::kValues) {
        uint32_t keep[2] = {~0u, ~0u};
        if (keys.may_hide(p, share, first)) weighted_keys(p_tile, keep);
        multiply_values<T, D>(rows, p_tile, keep, ring.values(plan, stage) + k * kStride + offset);
      }
    }
    spare = stage;
    stage = stage + 1 == plan.stages ? 0 : stage + 1;
  }

  simt::cp_async_wait<0>();
  __syncthreads();                                    // from here on the ring holds results
  auto* out = reinterpret_cast<float*>(ring.shared);  // [4 warps, 16, D] if P::kValues
  float* max = out + (P::kValues ? kWarps * kTileRows * D : 0);  // [4 warps, 16]
  float* sum = max + kWarps * kTileRows;                         // [4 warps, 16]
  const int tile = key_group * plan.row_tiles + row_tile;
  stage_rows<P::kValues>(rows, out + tile * kTileRows * D, max + tile * kTileRows,
                         sum + tile * kTileRows);
  __syncthreads();
  write_rows(p, share, keys.good(), key_groups, out, D, max, sum);
}

/// Launches the kernel for the element type and head size of the problem.
template <class P>
void launch_mma(const char* op, const P& p, Stream stream) {
  with_head_dim(p.plan, [&]<int D>() {
    const auto run = [&]<class T>() {
      simt::launch<attend_mma<T, D, P>>(op, attend_grid(p), dim3(kThreads), p.plan.shared_bytes,
                                        stream, p);
    };
    if (p.args.dtype == DType::kFloat16) return run.template operator()<simt::float16>();
    return run.template operator()<simt::bfloat16>();
  });
}

}  // namespace adaptive::cuda
