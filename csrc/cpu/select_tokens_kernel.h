// What the search of select_tokens asks of one instruction set: the passes over all scores.

#pragma once

#include <cstdint>

namespace adaptive::cpu {

constexpr int kSelectSlack = 16;  // entries beyond the last that collect may write

/// What there is among scores, -inf aside.
struct ScoreRange {
  bool wrong;  // NaN, negative or infinite
  float max;   // 0 if there is none above
};

struct SelectKernels {
  /// Copies those of scores [begin, end) that are at least `bound`, in order, with their positions;
  /// returns how many. Sets `nan` if there is one.
  int64_t (*collect)(const float* scores, int64_t begin, int64_t end, float bound, float* values,
                     int32_t* positions, bool& nan);
  ScoreRange (*range)(const float* scores, int64_t count);
  /// Sum of max(score, 0) * scale, each rounded to a whole number, half to even. Exact: no sum of
  /// them reaches 2^53, and `scale` is a power of two.
  double (*sum)(const float* scores, int64_t count, double scale);
};

SelectKernels select_kernels_base();
SelectKernels select_kernels_avx2();
SelectKernels select_kernels_avx512();

}  // namespace adaptive::cpu
