// The passes of select_tokens over all scores, for the instruction set of the file that includes
// it.

#pragma once

#include "cpu/select_tokens_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

template <class S>
int64_t collect_scores(const float* scores, int64_t begin, int64_t end, float bound, float* values,
                       int32_t* positions, bool& nan) {
  const auto bounds = S::set1(bound);
  int64_t count = 0;
  int64_t i = begin;
  for (; i + S::kWidth <= end; i += S::kWidth) {
    const auto score = S::load(scores + i);
    nan |= S::any_nan(score);
    count += S::compress(score, bounds, static_cast<int32_t>(i), values + count, positions + count);
  }
  for (; i < end; ++i) {
    nan |= scores[i] != scores[i];
    if (!(scores[i] >= bound)) continue;
    values[count] = scores[i];
    positions[count++] = static_cast<int32_t>(i);
  }
  return count;
}

template <class S>
ScoreRange score_range(const float* scores, int64_t count) {
  const auto lowest = S::set1(-__FLT_MAX__);
  auto max = S::zero(), min = S::zero();
  bool nan = false;
  const auto take = [&](const float* at) {
    const auto score = S::load(at);
    nan |= S::any_nan(score);
    max = S::max(score, max);
    min = S::min(S::select_less(score, lowest, S::zero(), score), min);  // -inf is no score
  };
  int64_t i = 0;
  for (; i + S::kWidth <= count; i += S::kWidth) take(scores + i);
  float rest[S::kWidth] = {};
  __builtin_memcpy(rest, scores + i, (count - i) * sizeof(float));
  take(rest);
  const float most = S::reduce_max(max);
  const bool negative = S::reduce_max(S::sub(S::zero(), min)) > 0;
  return {.wrong = nan || negative || most == kInfinity, .max = most};
}

inline double sum_scores(const float* scores, int64_t count, double scale) {
  typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
  typedef double Doubles __attribute__((vector_size(64)));
  constexpr int kLanes = 8;
  constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to whole numbers
  Doubles sum = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats score = *reinterpret_cast<const Floats*>(scores + i);
    const Floats positive = score > 0 ? score : Floats{};
    sum += (__builtin_convertvector(positive, Doubles) * scale + kRounder) - kRounder;
  }
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (; i < count; ++i) {
    total += ((scores[i] > 0 ? scores[i] : 0) * scale + kRounder) - kRounder;
  }
  return total;
}

template <class S>
SelectKernels select_kernels() {
  return {.collect = collect_scores<S>, .range = score_range<S>, .sum = sum_scores};
}

}  // namespace
}  // namespace adaptive::cpu
