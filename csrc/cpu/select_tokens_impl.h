// select_tokens' passes over all scores, one template on a SIMD trait. The loops without the trait
// are written for the compiler to vectorise.

#pragma once

#include "cpu/select_tokens_cut.h"
#include "cpu/select_tokens_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

template <class S>
int64_t take(const float* scores, int64_t begin, int64_t end, float limit, float* values,
             int32_t* positions) {
  const auto limits = S::set1(limit);
  int64_t count = 0, i = begin;
  for (; i + S::kWidth <= end; i += S::kWidth) {
    count += S::append_not_less(S::load(scores + i), limits, static_cast<int32_t>(i),
                                values + count, positions + count);
  }
  for (; i < end; ++i) {
    values[count] = scores[i];
    positions[count] = static_cast<int32_t>(i);
    count += !(scores[i] < limit);
  }
  return count;
}

// The bits of floats that are not negative order as integers do.
template <class S>
ScoreScan scan(const float* scores, int64_t count) {
  int32_t largest = 0;
  uint32_t invalid = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = __builtin_bit_cast(int32_t, scores[i]);
    largest = bits > largest ? bits : largest;
    const auto magnitude = static_cast<uint32_t>(bits) & 0x7fffffffu;
    invalid |=
        (bits < 0 ? 1u : 0u) & (magnitude != 0 ? 1u : 0u) & (magnitude != 0x7f800000u ? 1u : 0u);
  }
  return {__builtin_bit_cast(float, largest), invalid == 0 && largest < 0x7f800000};
}

template <class S>
uint64_t sum_parts(const float* scores, int64_t count, double unit) {
  constexpr int kLanes = 16;
  constexpr int64_t kExact = int64_t{1} << 20;  // additions of 2^32 that double holds exactly
  constexpr double kRounder = 0x1.8p52;         // adding it rounds to whole numbers
  uint64_t total = 0;
  const auto part = [unit](float x) {
    return (static_cast<double>(x > 0 ? x : 0) / unit + kRounder) - kRounder;
  };
  for (int64_t begin = 0; begin < count; begin += kExact) {
    const int64_t end = begin + kExact < count ? begin + kExact : count;
    double sums[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += part(scores[i + lane]);
    }
    for (; i < end; ++i) sums[0] += part(scores[i]);
    for (const double sum : sums) total += static_cast<uint64_t>(sum);
  }
  return total;
}

template <class S>
void rank(const float* scores, int64_t count, uint32_t* keys) {
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(scores[i]);
}

template <class S>
Cut cut(uint32_t* keys, int64_t count, uint64_t goal) {
  return find_cut<uint32_t>(keys, nullptr, count, goal);
}

template <class S>
constexpr SelectKernel kSelect = {take<S>, scan<S>, sum_parts<S>,
                                  rank<S>, cut<S>,  find_cut<uint64_t>};

}  // namespace
}  // namespace adaptive::cpu
