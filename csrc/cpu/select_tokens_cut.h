// How select_tokens on the CPU ranks scores: keys that order as they do, and the key at which the
// highest have reached a goal. Compiled for every instruction set: nothing here may emit a symbol.

#pragma once

#include "cpu/select_tokens_kernel.h"

namespace adaptive::cpu {
namespace {

constexpr int kBucketBits = 11;

/// Orders as the score does; -0 as 0.
[[maybe_unused]] inline uint32_t key_of(float score) {
  const auto bits = __builtin_bit_cast(uint32_t, score + 0.0f);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

[[maybe_unused]] inline float score_of(uint32_t key) {
  return __builtin_bit_cast(float, key >> 31 ? key & 0x7fffffffu : ~key);
}

/// See SelectKernel. Number is a type that holds the weights' sum.
template <class Number>
Cut find_cut(uint32_t* keys, Number* weights, int64_t count, uint64_t goal) {
  Number buckets[1 << kBucketBits];
  uint64_t above = 0;
  for (;;) {
    uint32_t low = ~0u, high = 0;
    for (int64_t i = 0; i < count; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    if (low == high) return {low, above};
    const int bits = 32 - __builtin_clz(high - low);
    const int shift = bits > kBucketBits ? bits - kBucketBits : 0;
    uint32_t bucket = (high - low) >> shift;
    for (uint32_t i = 0; i <= bucket; ++i) buckets[i] = 0;
    for (int64_t i = 0; i < count; ++i) {
      buckets[(keys[i] - low) >> shift] += weights != nullptr ? weights[i] : 1;
    }
    while (above + buckets[bucket] < goal) above += buckets[bucket--];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t key = keys[i];
      if (weights != nullptr) weights[kept] = weights[i];
      keys[kept] = key;
      kept += (key - low) >> shift == bucket;
    }
    count = kept;
  }
}

}  // namespace
}  // namespace adaptive::cpu
