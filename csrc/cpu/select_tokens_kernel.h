// What the selection (select_tokens.cpp) asks of one instruction set: the passes over all scores.
// Included by every instruction set's file: nothing here may emit a symbol.

#pragma once

#include <cstdint>

namespace adaptive::cpu {

constexpr int64_t kTakeSlack = 16;  // elements that a take may write beyond what it returns

/// What every score of a row must be known for, where shares of their sum count.
struct ScoreScan {
  float largest;  // at least 0
  bool valid;     // each is finite and not negative, or -inf
};

struct SelectKernel {
  /// Copies the scores that are not below `limit`, NaN included, and their positions, in order.
  /// Returns how many.
  int64_t (*take)(const float* scores, int64_t begin, int64_t end, float limit, float* values,
                  int32_t* positions);
  ScoreScan (*scan)(const float* scores, int64_t count);
  /// The sum of round(score / unit), -inf aside; ties to even. Every quotient is in 0..2^32.
  uint64_t (*sum_parts)(const float* scores, int64_t count, double unit);
};

extern const SelectKernel kSelectBase, kSelectAvx2, kSelectAvx512;

}  // namespace adaptive::cpu
