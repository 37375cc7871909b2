// The keys of gather_attention: where a list of tokens or pages says, then the extra tokens.

#pragma once

#include "../gather_attention.h"
#include "key_ring.cuh"

namespace adaptive::cuda {

class ListedKeys;

/// Slot s of a KV head is token s % page_size of page indices[s / page_size]; behind the list, from
/// the next tile on, come the extra tokens.
struct GatherProblem : Problem {
  using Keys = ListedKeys;

  const int32_t* indices;
  int64_t indices_stride[2];
  const int32_t* counts;
  int64_t counts_stride[2];
  int chosen;
  int page_bits;  // log2 of page_size
  int pages;      // of the cache
  const void* extra_key;
  const void* extra_value;
  const float* extra_bias;
  int extra;
  int64_t extra_key_stride[3];
  int64_t extra_value_stride[3];
  int64_t extra_bias_stride[3];
};

/// Launches the tensor-core kernels, for the 2-byte element types.
void attend_half(const char* op, const GatherProblem& p, Stream stream);

/// Reads the list one tile ahead of the copies that need it, so that no copy waits for an index:
/// while a tile is used, each thread fetches one entry of the tile that will be loaded next, and
/// publishes where it lies just before the barrier behind which the loading begins. An entry that
/// is out of range or does not ascend is never followed; it makes the results NaN. Every split
/// looks at its own entries and the one before: together, at all.
class ListedKeys {
  static constexpr int kMostStages = 4, kMostExtra = 64;
  static constexpr unsigned kSlots = 512;  // published; 5 tiles of at most 64 are in use at a time

 public:
  using Sight = cuda::Sight;
  static constexpr bool kCacheRows = false;  // they would cost a register that it does not have
  static constexpr int kSharedBytes = (kSlots + kMostExtra + 4) * sizeof(int);

  __device__ static int slots(const GatherProblem& p, Share& share) {
    const int count =
        p.counts[share.batch * p.counts_stride[0] + share.kv_head * p.counts_stride[1]];
    share.valid = share.valid && count >= 0 && count <= p.chosen;
    share.listed = share.valid ? count << p.page_bits : 0;
    return p.extra == 0 ? share.listed : extra_begin(p, share) + p.extra;
  }

  __device__ ListedKeys(const GatherProblem&, const Share&, void* shared)
      : positions_(static_cast<int*>(shared)) {
    if (threadIdx.x == 0) *failed() = 0;
  }

  /// Publishes the tiles of the first stages. Ends with a barrier.
  __device__ __forceinline__ void start(const GatherProblem& p, const Share& share) {
    int pages[kMostStages];
#pragma unroll
    for (int stage = 0; stage < kMostStages; ++stage) {
      if (stage < p.plan.stages) {
        pages[stage] = look(p, share, share.begin + stage * p.plan.tile_keys);
      }
    }
    load_biases(p, share);
    __syncthreads();  // none is found bad before `failed` was cleared
#pragma unroll
    for (int stage = 0; stage < kMostStages; ++stage) {
      page_ = pages[stage];
      if (stage + 1 >= p.plan.stages) break;
      publish(p, share, share.begin + stage * p.plan.tile_keys);
    }
    __syncthreads();
  }

  /// Asks for this thread's entry of the tile of slot `first`.
  __device__ __forceinline__ void fetch(const GatherProblem& p, const Share& share, int first) {
    page_ = look(p, share, first);
  }

  /// Says where the tile of slot `first`, which was fetched before, lies. A barrier must follow.
  __device__ __forceinline__ void publish(const GatherProblem& p, const Share& share, int first) {
    if (static_cast<int>(threadIdx.x) >= p.plan.tile_keys) return;
    const int slot = first + threadIdx.x;
    int position = kNone;
    if (is_extra(p, share, first)) {
      if (slot < share.end) position = slot - extra_begin(p, share);
    } else if (slot < min(share.end, share.listed)) {
      const int entry = slot >> p.page_bits;
      if (page_ < 0 || page_ >= p.pages || (entry > 0 && page_ <= list(p, share)[entry - 1])) {
        *failed() = 1;
      } else {
        position = (page_ << p.page_bits) + (slot & ((1 << p.page_bits) - 1));
        if (position >= share.length) position = kNone;
      }
    }
    positions_[static_cast<unsigned>(slot) % kSlots] = position;
  }

  /// Whether all entries were, once all tiles have been published and a barrier has followed.
  __device__ bool good() const { return *failed() == 0; }

  template <class T>
  __device__ __forceinline__ Source<T> source(const GatherProblem& p, const Share& share, int which,
                                              int first) const {
    if (!is_extra(p, share, first)) return cache_rows<T>(p.args, share, which);
    const void* base = which ? p.extra_value : p.extra_key;
    const int64_t(&stride)[3] = which ? p.extra_value_stride : p.extra_key_stride;
    return {static_cast<const T*>(base) + share.batch * stride[0] + share.kv_head * stride[1],
            stride[2]};
  }
  /// The row of the source that fills row `r` of the tile of slot `first`; kNone: zeros.
  __device__ __forceinline__ int row(const GatherProblem&, const Share&, int first, int r) const {
    return positions_[static_cast<unsigned>(first) % kSlots + r];
  }

  __device__ Sight sight(const GatherProblem& p, const Share& share, const Row& row) const {
    return Sight(p.args, share, row);
  }
  /// No tile is seen by all rows as it is: some entries may lie beyond the length.
  __device__ int common(const GatherProblem&, const Share&) const { return 0; }
  /// Whether a key of this tile may have weight 0 in every row, but an infinite or NaN value.
  __device__ bool may_hide(const GatherProblem& p, const Share& share, int first) const {
    return p.args.mask || is_extra(p, share, first);
  }
  /// The score of key `k` of the tile of slot `first`, with what is added to it; -inf if unseen.
  __device__ __forceinline__ float see(const GatherProblem& p, const Share& share,
                                       const Sight& sight, float score, int first, int k) const {
    if (is_extra(p, share, first)) {
      return add_bias(score, biases()[first - extra_begin(p, share) + k]);
    }
    return sight(p.args, score, positions_[static_cast<unsigned>(first) % kSlots + k]);
  }

 private:
  __device__ void load_biases(const GatherProblem& p, const Share& share) {
    if (share.end <= share.listed || threadIdx.x >= kMostExtra) return;
    const float* from = p.extra_bias + share.batch * p.extra_bias_stride[0] +
                        share.kv_head * p.extra_bias_stride[1];
    const int i = threadIdx.x;
    biases()[i] = i < p.extra ? from[i * p.extra_bias_stride[2]] : -kInfinity;
  }

  __device__ static const int32_t* list(const GatherProblem& p, const Share& share) {
    return p.indices + share.batch * p.indices_stride[0] + share.kv_head * p.indices_stride[1];
  }
  __device__ static int extra_begin(const GatherProblem& p, const Share& share) {
    return (share.listed + p.plan.tile_keys - 1) & -p.plan.tile_keys;  // a power of two
  }
  __device__ static bool is_extra(const GatherProblem& p, const Share& share, int first) {
    return p.extra > 0 && first >= share.listed;
  }
  __device__ __forceinline__ int look(const GatherProblem& p, const Share& share, int first) const {
    const int slot = first + threadIdx.x;
    if (static_cast<int>(threadIdx.x) >= p.plan.tile_keys) return 0;
    return slot < min(share.end, share.listed) ? list(p, share)[slot >> p.page_bits] : 0;
  }
  __device__ int* failed() const { return positions_ + kSlots; }
  /// Of the extra tokens; -inf behind the last.
  __device__ float* biases() const { return reinterpret_cast<float*>(positions_ + kSlots + 4); }

  int* positions_;  // [kSlots]: the row of each slot's source, or kNone
  int page_ = 0;    // of this thread's slot in the tile that is published next
};

}  // namespace adaptive::cuda
