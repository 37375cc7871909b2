// How select_tokens on the CPU ranks scores: keys that order as they do, and the key at which the
// highest have reached a goal. For files compiled for the baseline only.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

namespace adaptive::cpu {

constexpr int kBucketBits = 11;

/// Orders as the score does; -0 as 0.
inline uint32_t key_of(float score) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float score_of(uint32_t key) {
  return std::bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

/// A score in units of 2^-32 times the largest, to nearest, ties to even.
inline uint64_t part_of(float score, double unit) {
  return static_cast<uint64_t>(std::nearbyint(static_cast<double>(score) / unit));
}

/// Where the keys, from the highest down, have together reached a goal.
struct Cut {
  uint32_t key;
  uint64_t above;  // weight of the higher keys; below the goal
};

/// Reorders and overwrites keys and weights. A weight of null is 1 for each. The weights' sum must
/// be at least `goal`, and `goal` at least 1.
inline Cut find_cut(uint32_t* keys, uint64_t* weights, int64_t count, uint64_t goal) {
  uint64_t above = 0;
  for (;;) {
    const auto [low, high] = std::minmax_element(keys, keys + count);
    const uint32_t first = *low, range = *high - first;
    if (range == 0) return {first, above};
    const int shift = std::max(0, static_cast<int>(std::bit_width(range)) - kBucketBits);
    uint64_t buckets[1 << kBucketBits] = {};
    for (int64_t i = 0; i < count; ++i) {
      buckets[(keys[i] - first) >> shift] += weights ? weights[i] : 1;
    }
    uint32_t bucket = range >> shift;
    while (above + buckets[bucket] < goal) above += buckets[bucket--];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if ((keys[i] - first) >> shift != bucket) continue;
      if (weights) weights[kept] = weights[i];
      keys[kept++] = keys[i];
    }
    count = kept;
  }
}

}  // namespace adaptive::cpu
