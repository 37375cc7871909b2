// The ring of key and value tiles in shared memory, filled ahead of their use, and the simplest
// answer to where the rows of a tile lie: one after the other.

#pragma once

#include "decode_attention.cuh"

namespace adaptive::cuda {

inline constexpr int kNone = INT32_MAX;  // beyond every row

/// Rows of one KV head in global memory.
template <class T>
struct Source {
  const T* base;
  int64_t stride;  // in elements
};

/// The rows of the share's KV head in key (which = 0) or value (1).
template <class T>
__device__ __forceinline__ Source<T> cache_rows(const DecodeAttentionArgs& a, const Share& share,
                                                int which) {
  const void* base = which ? a.value : a.key;
  const int64_t(&stride)[3] = which ? a.value_stride : a.key_stride;
  return {static_cast<const T*>(base) + share.cache_row * stride[0] + share.kv_head * stride[1],
          stride[2]};
}

/// P::Keys of a problem that attends to every key: slot s is key s.
class AllKeys {
 public:
  using Sight = cuda::Sight;                // what is known of a row's keys
  static constexpr bool kCacheRows = true;  // a row of the query may read another of the cache

  __device__ static int slots(const Problem&, const Share& share) { return share.length; }

  __device__ AllKeys(const Problem&, const Share&, void*) {}
  __device__ void start(const Problem&, const Share&) {}
  __device__ void publish(const Problem&, const Share&, int) {}
  __device__ void fetch(const Problem&, const Share&, int) {}
  __device__ bool good() const { return true; }

  template <class T>
  __device__ __forceinline__ Source<T> source(const Problem& p, const Share& share, int which,
                                              int) const {
    return cache_rows<T>(p.args, share, which);
  }
  /// The row of the source that fills row `r` of the tile of slot `first`; kNone: zeros.
  __device__ __forceinline__ int row(const Problem&, const Share& share, int first, int r) const {
    return first + r < share.end ? first + r : kNone;
  }

  __device__ Sight sight(const Problem& p, const Share& share, const Row& row) const {
    return Sight(p.args, share, row);
  }
  /// Below this slot every row sees every key, without anything added to its score.
  __device__ int common(const Problem& p, const Share& share) const {
    if (p.args.mask) return 0;
    return share.length - (p.args.causal ? static_cast<int>(p.args.query_tokens) - 1 : 0);
  }
  /// Whether a key of this tile may have weight 0 in every row, but an infinite or NaN value.
  __device__ bool may_hide(const Problem& p, const Share&, int) const { return p.args.mask; }
  /// The score of key `k` of the tile of slot `first`, with what is added to it; -inf if unseen.
  __device__ __forceinline__ float see(const Problem& p, const Share&, const Sight& sight,
                                       float score, int first, int k) const {
    return sight(p.args, score, first + k);
  }
};

/// What the keys of a problem know of one row.
template <class P>
using SightOf = typename P::Keys::Sight;

/// Stages of key and value tiles in shared memory, filled ahead of their use by cp.async.
/// Rows are D elements and 16 bytes long: the 16 bytes spread the rows over the banks, so that
/// eight rows read at the same column (ldmatrix) do not collide. What is not loaded is zero.
template <class T, int D, class P>
struct Ring {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kStride = D + kVector;
  static constexpr int kStreams = P::kValues ? 2 : 1;

  T* shared;  // [stages, kStreams, tile_keys, kStride]

  __device__ T* keys(const Plan& plan, int stage) const {
    return shared + stage * kStreams * plan.tile_keys * kStride;
  }
  __device__ T* values(const Plan& plan, int stage) const {
    return keys(plan, stage) + plan.tile_keys * kStride;
  }
  /// The shared memory behind the ring.
  __device__ void* end(const Plan& plan) const { return keys(plan, plan.stages); }

  /// Starts one group of copies: the tile of the slots from `first` on that lie before share.end.
  __device__ __forceinline__ void load(const P& p, const Share& share, const typename P::Keys& from,
                                       int stage, int first) const {
    if (first < share.end) {
#pragma unroll 1
      for (int which = 0; which < kStreams; ++which) {
        T* to = which ? values(p.plan, stage) : keys(p.plan, stage);
        const Source<T> source = from.template source<T>(p, share, which, first);
        if (p.wide) {
          load_wide(p, share, from, to, source, first);
        } else {
          load_narrow(p, share, from, to, source, first);
        }
      }
    }
    simt::cp_async_commit();
  }

  /// Waits for the oldest stage, with stages - 1 groups in flight. A barrier must follow.
  __device__ static void wait(const Plan& plan) {
    switch (plan.stages) {
      case 2: return simt::cp_async_wait<0>();
      case 3: return simt::cp_async_wait<1>();
      default: return simt::cp_async_wait<2>();
    }
  }

 private:
  __device__ __forceinline__ static void load_wide(const P& p, const Share& share,
                                                   const typename P::Keys& from, T* to,
                                                   const Source<T>& source, int first) {
    constexpr int kVectors = D / kVector;
#pragma unroll(D > 128 ? 2 : 4)
    for (int i = threadIdx.x; i < p.plan.tile_keys * kVectors; i += kThreads) {
      const int r = i / kVectors, column = i % kVectors * kVector;
      const int row = from.row(p, share, first, r);
      const bool valid = row != kNone && column < p.args.head_dim;
      const T* at = valid ? source.base + row * source.stride + column : source.base;
      simt::cp_async16(to + r * kStride + column, at, valid);
    }
  }

  __device__ __forceinline__ static void load_narrow(const P& p, const Share& share,
                                                     const typename P::Keys& from, T* to,
                                                     const Source<T>& source, int first) {
#pragma unroll(D > 128 ? 2 : 4)
    for (int i = threadIdx.x; i < p.plan.tile_keys * D; i += kThreads) {
      const int r = i / D, column = i % D;
      const int row = from.row(p, share, first, r);
      const bool valid = row != kNone && column < p.args.head_dim;
      to[r * kStride + column] = valid ? source.base[row * source.stride + column] : T{};
    }
  }
};

}  // namespace adaptive::cuda
