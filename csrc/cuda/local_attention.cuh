// Which keys the queries of a block of local_attention see, and in what order they are dealt with.
//
// A block takes `tile_tokens` query tokens of `fold` query heads of one KV head; each of its warps
// takes 16 tokens of one head. Keys come in *steps* of 16 neighbours: first those that hold far
// sinks, then those near the queries; of both only those in the block's list, if there are lists.

#pragma once

#include <cstdint>

#include "../local_attention.h"
#include "../simt/simt.h"
#include "decode_attention.cuh"

namespace adaptive::cuda {

inline constexpr int kStep = 16;         // keys of a step, and query tokens of a warp
inline constexpr int kMostWarps = 8;     // of a block
inline constexpr int kBehind = 1 << 30;  // beyond every key, and far from overflow

/// The argument of the kernels.
struct LocalProblem {
  LocalAttentionArgs args;
  int fold;         // query heads of a block, all of one KV head
  int tile_tokens;  // query tokens of a block, all of one list
  int tiles;        // blocks along the query tokens
  int list_bits;    // log2 of the steps in a listed block
  float factor;     // makes scores, in base 2 unless they are capped, of products
  float cap;        // of scores in base 2; 0: off
  bool wide;        // key and value rows start on 16-byte boundaries
  bool wide_query;
  bool wide_out;
};

/// Launches the tensor-core kernels, for the 2-byte element types.
void attend_local_half(const LocalProblem& p, dim3 grid, int warps, Stream stream);

/// The queries of this block, and of this warp among them.
struct QueryTile {
  int64_t batch, kv_head, head;
  int block_token, token;  // the first of the block and of the warp
  int existing;            // how many of the warp's 16 exist; 0 or less: none

  __device__ explicit QueryTile(const LocalProblem& p) {
    const LocalAttentionArgs& a = p.args;
    const unsigned tiles = p.tiles, shares = static_cast<unsigned>(a.heads) / p.fold;
    const int warp = threadIdx.x / kLanes, token_tiles = p.tile_tokens / kStep;
    unsigned rest = blockIdx.x;
    // The last tokens see most keys where causality alone limits them: they go first.
    block_token = static_cast<int>(tiles - 1 - rest % tiles) * p.tile_tokens;
    rest /= tiles;
    const unsigned first_head = rest % shares * p.fold;
    batch = rest / shares;
    kv_head = first_head / static_cast<unsigned>(a.heads / a.kv_heads);
    head = first_head + warp / token_tiles;
    token = block_token + warp % token_tiles * kStep;
    existing = static_cast<int>(a.query_tokens) - token;
  }
};

/// The keys one query sees: [first, sink_end) and [begin, end).
struct alignas(16) LocalSight {
  int first, sink_end, begin, end;

  __device__ __forceinline__ bool sees(int key) const {
    return (key >= begin && key < end) || (key >= first && key < sink_end);
  }
};

/// How many of the ascending `list` are below `x`.
__device__ __forceinline__ int count_below(const int32_t* list, int count, int x) {
  int low = 0;
  while (low < count) {
    const int middle = (low + count) / 2;
    if (list[middle] < x) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

/// What the query at `position` of this row and head sees.
__device__ __forceinline__ LocalSight sight_of(const LocalAttentionArgs& a, const QueryTile& tile,
                                               int position) {
  int first = 0, last = static_cast<int>(a.tokens);
  if (a.offsets) {
    const int32_t* cuts = a.offsets + tile.batch * a.offsets_stride;
    const int number = count_below(cuts, static_cast<int>(a.cuts), position + 1);
    if (number == 0 || number == a.cuts) return {};  // padding
    first = cuts[number - 1];
    last = cuts[number];
  }
  const int64_t window = a.windows ? a.windows[tile.head] : a.window, p = position;
  const int64_t until = a.causal ? p + 1 : last;
  return {first, static_cast<int>(min(first + a.sinks, until)),
          static_cast<int>(max(int64_t{first}, p - window + 1)),
          static_cast<int>(min(until, p + window))};
}

/// The keys that some query of a warp or block sees: those of [far_begin, far_end), sinks of the
/// sequence that began before the block, and of [near_begin, near_end).
struct Reach {
  int far_begin, far_end, near_begin, near_end;
  int all_begin, all_end;  // every query of the warp sees [all_begin, all_end)
  int bad;                 // data on the device is out of range
  int unused;

  __device__ __forceinline__ bool holds(int key) const {
    return (key >= near_begin && key < near_end) || (key >= far_begin && key < far_end);
  }
  /// Whether any of the step's keys may be seen.
  __device__ __forceinline__ bool touches(int step) const {
    return (step > near_begin - kStep && step < near_end) ||
           (step > far_begin - kStep && step < far_end);
  }
  __device__ __forceinline__ bool covers(int step) const {
    return step >= all_begin && step <= all_end - kStep;
  }
};

/// The block's list of blocks of keys, ascending; none: every key is listed.
struct BlockList {
  const int32_t* blocks = nullptr;
  int count = 0;

  __device__ BlockList(const LocalAttentionArgs& a, const QueryTile& tile) {
    if (!a.counts) return;
    const int64_t list = a.lists == a.heads ? tile.head : tile.kv_head;
    const int64_t query_block = tile.block_token / a.block_size;
    blocks = a.blocks + tile.batch * a.blocks_stride[0] + list * a.blocks_stride[1] +
             query_block * a.blocks_stride[2];
    count = a.counts[tile.batch * a.counts_stride[0] + list * a.counts_stride[1] +
                     query_block * a.counts_stride[2]];
  }
};

/// The steps that a block deals with, in order: where the keys of each begin.
class Steps {
 public:
  int count;  // 0 where data is out of range: nothing is followed then

  __device__ Steps(const LocalProblem& p, const BlockList& list, const Reach& reach)
      : count(0), blocks_(list.blocks), bits_(list.blocks ? p.list_bits : 0) {
    if (reach.bad || reach.near_begin >= reach.near_end) return;
    if (p.args.counts && list.count == 0) return;  // an empty list may lie nowhere
    const int unit = kStep << bits_;
    const auto place = [&](int block) {
      return blocks_ ? count_below(blocks_, list.count, block) << bits_ : block;
    };
    near_ = place(reach.near_begin / unit);
    int near_end = place((reach.near_end + unit - 1) / unit);
    if (reach.far_begin < reach.far_end) {
      far_ = place(reach.far_begin / unit);
      const int far_end = place((reach.far_end + unit - 1) / unit);
      near_end = max(near_end, far_end);
      far_count_ = min(far_end, near_) - far_;
    }
    count = far_count_ + near_end - near_;
  }

  /// The first key of step `i`; kBehind after the last.
  __device__ __forceinline__ int operator[](int i) const {
    if (i >= count) return kBehind;
    const int step = i < far_count_ ? far_ + i : near_ + i - far_count_;
    if (!blocks_) return step * kStep;
    const int within = step & ((1 << bits_) - 1);
    return ((blocks_[step >> bits_] << bits_) + within) * kStep;
  }

 private:
  const int32_t* blocks_;
  int bits_;
  int far_ = 0, far_count_ = 0, near_ = 0;
};

/// What the threads of a block know together. It stays in shared memory: registers are scarce.
struct LocalShared {
  LocalSight sights[kMostWarps * kStep];
  Reach reaches[kMostWarps];  // of the warps
  Reach reach;                // of the block
  Steps steps;
};
static_assert(sizeof(LocalShared) % 16 == 0);  // rows of 16 aligned bytes follow

/// Reduces over the lanes of a warp.
template <class Reduce>
__device__ __forceinline__ int reduce_lanes(int x, Reduce combine) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

/// Finds the sights of the warp's queries. `bad` is whether this thread met data out of range.
__device__ __forceinline__ void look(const LocalProblem& p, const QueryTile& tile, bool bad,
                                     LocalShared& shared) {
  const LocalAttentionArgs& a = p.args;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, row = lane % kStep;
  const int shift = static_cast<int>(a.tokens - a.query_tokens);
  LocalSight sight = {};
  if (row < tile.existing) sight = sight_of(a, tile, shift + tile.token + row);
  if (lane < kStep) shared.sights[warp * kStep + lane] = sight;

  // Sinks of a sequence that begins in this block lie in one piece with what its first query sees.
  const bool any = sight.begin < sight.end, far = any && sight.first < shift + tile.block_token;
  const auto least = [](int x, int y) { return min(x, y); };
  const auto most = [](int x, int y) { return max(x, y); };
  Reach reach;
  reach.far_begin = reduce_lanes(far ? sight.first : kBehind, least);
  reach.far_end = reduce_lanes(far ? sight.sink_end : 0, most);
  reach.near_begin = reduce_lanes(!any ? kBehind : far ? sight.begin : sight.first, least);
  reach.near_end = reduce_lanes(far ? sight.end : max(sight.end, sight.sink_end), most);
  reach.all_begin = reduce_lanes(sight.begin, most);
  reach.all_end = reduce_lanes(sight.end, least);
  reach.bad = __ballot_sync(~0u, bad) != 0;
  if (lane == 0) shared.reaches[warp] = reach;
}

/// Whether this thread's share of the data that the block depends on is out of range.
__device__ __forceinline__ bool is_bad(const LocalAttentionArgs& a, const QueryTile& tile,
                                       const BlockList& list) {
  bool bad = a.windows && a.windows[tile.head] < 1;
  if (a.offsets) {
    const int32_t* cuts = a.offsets + tile.batch * a.offsets_stride;
    for (int i = threadIdx.x; i < a.cuts; i += blockDim.x) {
      bad = bad || cuts[i] < (i == 0 ? 0 : cuts[i - 1]) || cuts[i] > a.tokens;
    }
  }
  if (!a.counts) return bad;
  if (list.count < 0 || list.count > a.chosen) return true;
  const int blocks = static_cast<int>((a.tokens + a.block_size - 1) / a.block_size);
  for (int i = threadIdx.x; i < list.count; i += blockDim.x) {
    const int block = list.blocks[i];
    bad = bad || block <= (i == 0 ? -1 : list.blocks[i - 1]) || block >= blocks;
  }
  return bad;
}

/// Finds what the block reaches and which steps that makes. A barrier must lie between this and
/// `look`, and another before its use.
__device__ __forceinline__ void plan_steps(const LocalProblem& p, const BlockList& list,
                                           LocalShared& shared) {
  if (threadIdx.x != 0) return;
  Reach all = shared.reaches[0];
  const int warps = blockDim.x / kLanes;
  for (int warp = 1; warp < warps; ++warp) {
    const Reach& one = shared.reaches[warp];
    all.far_begin = min(all.far_begin, one.far_begin);
    all.far_end = max(all.far_end, one.far_end);
    all.near_begin = min(all.near_begin, one.near_begin);
    all.near_end = max(all.near_end, one.near_end);
    all.bad |= one.bad;
  }
  shared.reach = all;
  shared.steps = Steps(p, list, all);
}

}  // namespace adaptive::cuda
