// Which keys a query row of decode_attention sees: length, causality and mask, one bit per key.

#pragma once

#include "cpu/decode_attention_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

/// Keys that at least one query row of an item sees, of the 64 that start at key `first`.
template <class E>
struct Block {
  int64_t first;
  int count;                   // 0: there is no such block
  bool whole;                  // every row sees all of them
  uint8_t offset[kBlockKeys];  // of each key from `first`
  const E* key[kBlockKeys];    // after `count`, the last is repeated
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
        mask_per_head_(args.mask != nullptr && args.mask_stride[1] != 0) {}

  /// The first block at or after key `first`. Looks one block beyond the item's end: it is likely
  /// this thread's next, and worth a prefetch.
  void find(int64_t first, Block<E>& block) {
    const int64_t beyond = item_.end + kBlockKeys;
    const int64_t end = length_ < beyond ? length_ : beyond;
    const int64_t group = args_.heads / args_.kv_heads;
    for (; first < end; first += kBlockKeys) {
      uint64_t any = 0;
      uint64_t all = ~uint64_t{0};
      for (int64_t row = 0; row < (mask_per_head_ ? group : 1) * args_.query_tokens; ++row) {
        seen_[row] = seen_keys(row, first);
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
  }

  /// Adds an additive mask to a row's scores of the block.
  void add_mask(const Block<E>& block, int64_t row, float* scores) const {
    const float* bias = mask<float>(row, block.first);
    const int64_t stride = args_.mask_stride[3];
    for (int i = 0; i < block.count; ++i) scores[i] += bias[block.offset[i] * stride];
  }

  /// Sets the row's scores of keys that it does not see to -inf. Call before the next find.
  void hide_unseen(const Block<E>& block, int64_t row, float* scores) const {
    const uint64_t seen = seen_[mask_per_head_ ? row : row % args_.query_tokens];
    for (int i = 0; i < block.count; ++i) {
      if ((seen >> block.offset[i] & 1) == 0) scores[i] = -kInfinity;
    }
  }

 private:
  // Bit i: the row sees key first + i.
  uint64_t seen_keys(int64_t row, int64_t first) const {
    const int64_t later = args_.query_tokens - 1 - row % args_.query_tokens;
    const int64_t left = length_ - (args_.causal ? later : 0) - first;
    if (left <= 0) return 0;
    const int count = left < kBlockKeys ? static_cast<int>(left) : kBlockKeys;
    const uint64_t within = ~uint64_t{0} >> (kBlockKeys - count);
    if (args_.mask == nullptr) return within;
    return args_.mask_add ? finite_keys(mask<float>(row, first), count)
                          : true_keys(mask<uint8_t>(row, first), count);
  }

  template <class M>
  const M* mask(int64_t row, int64_t first) const {
    const int64_t head = item_.kv_head * (args_.heads / args_.kv_heads) + row / args_.query_tokens;
    const int64_t token = row % args_.query_tokens;
    return static_cast<const M*>(args_.mask) + item_.batch * args_.mask_stride[0] +
           head * args_.mask_stride[1] + token * args_.mask_stride[2] +
           first * args_.mask_stride[3];
  }

  uint64_t finite_keys(const float* mask, int count) const {
    const int64_t stride = args_.mask_stride[3];
    uint64_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= uint64_t{mask[i * stride] != -kInfinity} << i;
    return bits;
  }

  uint64_t true_keys(const uint8_t* mask, int count) const {
    const int64_t stride = args_.mask_stride[3];
    uint64_t bits = 0;
    for (int i = 0; i < count; ++i) bits |= uint64_t{mask[i * stride] != 0} << i;
    return bits;
  }

  void list_keys(uint64_t any, Block<E>& block) const {
    const int64_t* key_stride = args_.key_stride;
    const int64_t* value_stride = args_.value_stride;
    const E* key = static_cast<const E*>(args_.key) + item_.batch * key_stride[0] +
                   item_.kv_head * key_stride[1] + block.first * key_stride[2];
    const E* value = static_cast<const E*>(args_.value) + item_.batch * value_stride[0] +
                     item_.kv_head * value_stride[1] + block.first * value_stride[2];
    if (any == ~uint64_t{0}) {
      for (int i = 0; i < kBlockKeys; ++i) {
        block.offset[i] = static_cast<uint8_t>(i);
        block.key[i] = key + i * key_stride[2];
        block.value[i] = value + i * value_stride[2];
      }
      block.count = kBlockKeys;
      return;
    }
    block.count = __builtin_popcountll(any);
    int offset = 0;
    for (int i = 0; i < kBlockKeys; ++i, any &= any - 1) {
      if (i < block.count) offset = __builtin_ctzll(any);
      block.offset[i] = static_cast<uint8_t>(offset);
      block.key[i] = key + offset * key_stride[2];
      block.value[i] = value + offset * value_stride[2];
    }
  }

  const DecodeAttentionArgs& args_;
  const DecodeItem& item_;
  uint64_t* const seen_;  // per query token, or per query row if the mask differs between heads
  const int64_t length_;
  const bool mask_per_head_;
};

}  // namespace
}  // namespace adaptive::cpu
