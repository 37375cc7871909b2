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

/// Where the keys, from the highest down, have together reached a goal.
struct Cut {
  uint32_t key;
  uint64_t above;  // number or weight of the higher keys; below the goal
};

struct SelectKernel {
  /// Copies the scores that are not below `limit`, NaN included, and their positions, in order.
  /// Returns how many.
  int64_t (*take)(const float* scores, int64_t begin, int64_t end, float limit, float* values,
                  int32_t* positions);
  ScoreScan (*scan)(const float* scores, int64_t count);
  /// The sum of round(score / unit), -inf aside; ties to even. Every quotient is in 0..2^32.
  uint64_t (*sum_parts)(const float* scores, int64_t count, double unit);
  /// The keys of `count` scores.
  void (*rank)(const float* scores, int64_t count, uint32_t* keys);
  /// The key that is the goal-th highest; overwrites the keys. `goal` is in 1..count.
  Cut (*cut)(uint32_t* keys, int64_t count, uint64_t goal);
  /// The key at which the weights reach the goal, at least 1 and at most their sum; overwrites
  /// both.
  Cut (*cut_weights)(uint32_t* keys, uint64_t* weights, int64_t count, uint64_t goal);
};

extern const SelectKernel kSelectBase, kSelectAvx2, kSelectAvx512;

}  // namespace adaptive::cpu
