// The two matrix products of local_attention, for one warp: on tensor cores for 2-byte elements, on
// CUDA cores for float32, with the same elements in the same lanes. Lane 4g + t holds rows g and
// g + 8 of the queries, columns 2t and 2t + 1 of every 8 keys or output columns.

#pragma once

#include "decode_attention_mma.cuh"
#include "local_attention.cuh"

namespace adaptive::cuda {

/// Sizes in shared memory. Rows are 16 bytes longer than D elements, see Ring.
template <class T, int D>
struct LocalShape {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kStride = D + kVector;
  static constexpr int kRowBytes = D * sizeof(T);
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;  // of a tile
  static constexpr int kSteps = kKeys / kStep;

  static constexpr int shared_bytes(int warps) {
    return static_cast<int>(sizeof(LocalShared)) +
           (warps * kStep + 4 * kKeys) * kStride * static_cast<int>(sizeof(T));
  }
};

/// Two products of a warp on tensor cores: queries times keys, weights times values.
template <class T, int D>
class Products {
  using S = LocalShape<T, D>;

 public:
  __device__ explicit Products(const T* query)
      : offset_(tile_offset<S::kStride>()), query_(query + offset_) {}

  __device__ __forceinline__ void scores(float (&to)[S::kKeys / 8][4], const T* keys) const {
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t q[4];
      query_.get(c, q);
#pragma unroll
      for (int s = 0; s < S::kSteps; ++s) {
        uint32_t key[4];
        simt::ldmatrix_x4(key, keys + s * kStep * S::kStride + offset_ + c * 16);
        simt::mma_m16n8k16<T>(to[2 * s], q, key[0], key[2]);
        simt::mma_m16n8k16<T>(to[2 * s + 1], q, key[1], key[3]);
      }
    }
  }

  /// out += the weights of one step, p[0] and p[1], times its values.
  __device__ __forceinline__ void add(float (&out)[D / 8][4], const float (&p0)[4],
                                      const float (&p1)[4], const T* values) const {
    uint32_t high[4], low[4];
    split<T>(p0[0], p0[1], high[0], low[0]);
    split<T>(p0[2], p0[3], high[1], low[1]);
    split<T>(p1[0], p1[1], high[2], low[2]);
    split<T>(p1[2], p1[3], high[3], low[3]);
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      uint32_t value[4];
      simt::ldmatrix_x4<true>(value, values + offset_ + c * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        simt::mma_m16n8k16<T>(out[2 * c + i], high, value[2 * i], value[2 * i + 1]);
        simt::mma_m16n8k16<T>(out[2 * c + i], low, value[2 * i], value[2 * i + 1]);
      }
    }
  }

 private:
  int offset_;
  Query<T, D> query_;
};

/// The same products on CUDA cores, with the same elements in the same lanes.
template <int D>
class Products<float, D> {
  using S = LocalShape<float, D>;

 public:
  __device__ explicit Products(const float* query)
      : query_(query + threadIdx.x % kLanes / 4 * S::kStride), pair_(threadIdx.x % 4 * 2) {}

  __device__ __forceinline__ void scores(float (&to)[S::kKeys / 8][4], const float* keys) const {
#pragma unroll 1
    for (int c = 0; c < D; c += 4) {
      const float4 q[2] = {*reinterpret_cast<const float4*>(query_ + c),
                           *reinterpret_cast<const float4*>(query_ + 8 * S::kStride + c)};
#pragma unroll
      for (int j = 0; j < S::kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float* key = keys + (8 * j + pair_ + e) * S::kStride + c;
          const float4 k = *reinterpret_cast<const float4*>(key);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            to[j][2 * i + e] += q[i].x * k.x + q[i].y * k.y + q[i].z * k.z + q[i].w * k.w;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add(float (&out)[D / 8][4], const float (&p0)[4],
                                      const float (&p1)[4], const float* values) const {
    const int first_lane = threadIdx.x % kLanes / 4 * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // keys of one half, one parity
      const float mine[2] = {j / 2 ? p1[j % 2] : p0[j % 2], j / 2 ? p1[2 + j % 2] : p0[2 + j % 2]};
#pragma unroll 1
      for (int t = 0; t < 4; ++t) {
        const float w[2] = {__shfl_sync(~0u, mine[0], first_lane + t),
                            __shfl_sync(~0u, mine[1], first_lane + t)};
        const float* value = values + (j / 2 * 8 + 2 * t + j % 2) * S::kStride + pair_;
#pragma unroll
        for (int c = 0; c < D / 8; ++c) {
          const float2 v = *reinterpret_cast<const float2*>(value + 8 * c);
          out[c][0] += w[0] * v.x;
          out[c][1] += w[0] * v.y;
          out[c][2] += w[1] * v.x;
          out[c][3] += w[1] * v.y;
        }
      }
    }
  }

 private:
  const float* query_;
  int pair_;
};

}  // namespace adaptive::cuda
