// Which keys a query row sees: chosen or not, length, causality and mask, one bit per key.

#pragma once

#include "cpu/decode_attention_kernel.h"
#include "cpu/simd.h"
#include "cpu/tree_keys.h"

namespace adaptive::cpu {
namespace {

/// Keys that at least one query row of an item sees, of the 64 that start at key `first`.
template <class E>
struct Block {
  int64_t first;
  int count;                 // 0: there is no such block
  bool whole;                // every row sees all of them
  bool extra;                // these are the tokens from outside the cache
  uint8_t slot[kBlockKeys];  // of each key from `first`
  const E* key[kBlockKeys];  // after `count`, the last is repeated
  const E* value[kBlockKeys];
};

/// Finds the blocks of one item, in order.
template <class E>
class KeyFinder {
 public:
  KeyFinder(const DecodeAttentionArgs& args, const DecodeItem& item, uint64_t* seen)
      : args_(args),
        item_(item),
        seen_(seen),
        length_(args.lengths ? args.lengths[item.batch] : args.capacity),
        listed_(item.list ? listed_keys(*item.list, item.batch, item.kv_head) : length_),
        mask_per_head_(args.mask != nullptr && args.mask_stride[1] != 0),
        tree_(args, item.batch, length_) {}

  /// The first block at or after key `first`. Looks one block beyond the item's end: it is likely
  /// this thread's next, and worth a prefetch.
  void find(int64_t first, Block<E>& block) {
    const int64_t beyond = item_.end + kBlockKeys;
    const int64_t end = listed_ < beyond ? listed_ : beyond;
    const int64_t group = args_.heads / args_.kv_heads;
    block.extra = false;
    for (; first < end; first += kBlockKeys) {
      const int candidates = locate(first);
      uint64_t any = 0;
      uint64_t all = ~uint64_t{0};
      for (int64_t row = 0; row < (mask_per_head_ ? group : 1) * args_.query_tokens; ++row) {
        seen_[row] = seen_keys(row, candidates);
        any |= seen_[row];
        all &= seen_[row];
      }
      if (any == 0) continue;
      block.first = first;
      block.whole = any == all;
      list_keys(any, block);
      return;
    }
    block.count = 0;
    if (item_.list != nullptr && first < beyond) list_extra(first, block);
  }

  /// Turns the row's scores of a block into what the softmax takes: adds the mask, sets those of
  /// keys that it does not see to -inf. Call before the next find.
  void finish_scores(const Block<E>& block, int64_t row, float* scores) const {
    if (block.extra) return add_bias(block, scores);
    if (args_.mask != nullptr && args_.mask_add) {
      const float* bias = mask<float>(row);
      const int64_t stride = args_.mask_stride[3];
      for (int i = 0; i < block.count; ++i) scores[i] += bias[position_[block.slot[i]] * stride];
    }
    if (block.whole) return;
    const uint64_t seen = seen_[mask_per_head_ ? row : row % args_.query_tokens];
    for (int i = 0; i < block.count; ++i) {
      if ((seen >> block.slot[i] & 1) == 0) scores[i] = -kInfinity;
    }
  }

 private:
  // Finds where up to 64 keys from `first` on lie in the cache; returns how many.
  int locate(int64_t first) {
    const int64_t left = listed_ - first;
    const int count = left < kBlockKeys ? static_cast<int>(left) : kBlockKeys;
    if (item_.list == nullptr) {
      for (int i = 0; i < kBlockKeys; ++i) position_[i] = first + i;
      return count;
    }
    const GatherAttentionArgs& list = *item_.list;
    const int32_t* entries = list.indices + item_.batch * list.indices_stride[0] +
                             item_.kv_head * list.indices_stride[1];
    const int shift = __builtin_ctzll(list.page_size);
    for (int i = 0; i < count; ++i) {
      const int64_t page = entries[(first + i) >> shift];
      position_[i] = (page << shift) + ((first + i) & (list.page_size - 1));
    }
    return count;
  }

  // Bit i: the row sees the key at position_[i]. Positions ascend.
  uint64_t seen_keys(int64_t row, int candidates) const {
    const int64_t later = args_.query_tokens - 1 - row % args_.query_tokens;
    const int64_t limit = length_ - (args_.causal ? later : 0);
    int count = candidates;
    while (count > 0 && position_[count - 1] >= limit) --count;
    if (count == 0) return 0;
    uint64_t within = ~uint64_t{0} >> (kBlockKeys - count);
    if (args_.parents != nullptr) within &= tree_.seen(row % args_.query_tokens, position_[0]);
    if (args_.mask == nullptr) return within;
    return within & (args_.mask_add ? finite_keys(mask<float>(row), count)
                                    : true_keys(mask<uint8_t>(row), count));
  }

  template <class M>
  const M* mask(int64_t row) const {
    const int64_t head = item_.kv_head * (args_.heads / args_.kv_heads) + row / args_.query_tokens;
    const int64_t token = row % args_.query_tokens;
    return static_cast<const M*>(args_.mask) + item_.batch * args_.mask_stride[0] +
           head * args_.mask_stride[1] + token * args_.mask_stride[2];
  }

  uint64_t finite_keys(const float* mask, int count) const {
    const int64_t stride = args_.mask_stride[3];
    uint64_t bits = 0;
    for (int i = 0; i < count; ++i) {
      bits |= uint64_t{mask[position_[i] * stride] != -kInfinity} << i;
    }
    return bits;
  }

  uint64_t true_keys(const uint8_t* mask, int count) const {
    const int64_t stride = args_.mask_stride[3];
    uint64_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= uint64_t{mask[position_[i] * stride] != 0} << i;
    return bits;
  }

  void list_keys(uint64_t any, Block<E>& block) const {
    const int64_t key_stride = args_.key_stride[2], value_stride = args_.value_stride[2];
    const int64_t row = args_.cache_rows ? args_.cache_rows[item_.batch] : item_.batch;
    const E* key = static_cast<const E*>(args_.key) + row * args_.key_stride[0] +
                   item_.kv_head * args_.key_stride[1];
    // Without values, what scoring fetches ahead is the next block of keys.
    const E* value = args_.value == nullptr
                         ? key + kBlockKeys * key_stride
                         : static_cast<const E*>(args_.value) + row * args_.value_stride[0] +
                               item_.kv_head * args_.value_stride[1];
    const int64_t step = args_.value == nullptr ? key_stride : value_stride;
    block.count = __builtin_popcountll(any);
    int slot = 0;
    for (int i = 0; i < kBlockKeys; ++i, any &= any - 1) {
      if (i < block.count) slot = __builtin_ctzll(any);
      block.slot[i] = static_cast<uint8_t>(slot);
      block.key[i] = key + position_[slot] * key_stride;
      block.value[i] = value + position_[slot] * step;
    }
  }

  // The extra tokens, if the item ends with them: they are numbered from the next block on.
  void list_extra(int64_t first, Block<E>& block) const {
    const GatherAttentionArgs& list = *item_.list;
    if (list.extra == 0 || first != (listed_ + kBlockKeys - 1) / kBlockKeys * kBlockKeys) return;
    const int64_t* key_stride = list.extra_key_stride;
    const int64_t* value_stride = list.extra_value_stride;
    const E* key = static_cast<const E*>(list.extra_key) + item_.batch * key_stride[0] +
                   item_.kv_head * key_stride[1];
    const E* value = static_cast<const E*>(list.extra_value) + item_.batch * value_stride[0] +
                     item_.kv_head * value_stride[1];
    block.first = first;
    block.count = static_cast<int>(list.extra);
    block.extra = true;
    for (int i = 0; i < kBlockKeys; ++i) {
      const int slot = i < block.count ? i : block.count - 1;
      block.slot[i] = static_cast<uint8_t>(slot);
      block.key[i] = key + slot * key_stride[2];
      block.value[i] = value + slot * value_stride[2];
    }
  }

  void add_bias(const Block<E>& block, float* scores) const {
    const GatherAttentionArgs& list = *item_.list;
    const int64_t* stride = list.extra_bias_stride;
    const float* bias = list.extra_bias + item_.batch * stride[0] + item_.kv_head * stride[1];
    for (int i = 0; i < block.count; ++i) {
      const float add = bias[i * stride[2]];
      scores[i] = add == -kInfinity ? add : scores[i] + add;
    }
  }

  const DecodeAttentionArgs& args_;
  const DecodeItem& item_;
  uint64_t* const seen_;  // per query token, or per query row if the mask differs between heads
  const int64_t length_;
  const int64_t listed_;  // keys that the item's numbers go through
  const bool mask_per_head_;
  const TreeKeys tree_;
  int64_t position_[kBlockKeys];  // in the cache, of the keys of the block that was found last
};

}  // namespace
}  // namespace adaptive::cpu
