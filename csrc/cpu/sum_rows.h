// Sums of rows, column by column in registers: what kernels that pool or add up tokens share.

#pragma once

#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

/// Adds up rows in order, up to U units of columns at a time, in float32.
///
/// `row(i)` is where row i begins; `finish(sum)` is what becomes of a vector of sums.
template <class S, class E, class Row, class Finish>
class RowSums {
 public:
  RowSums(int64_t rows, int columns, const Row& row, const Finish& finish, float* to)
      : rows_(rows), columns_(columns), row_(row), finish_(finish), to_(to) {}

  void run() const {
    int column = 0;
    for (; column + 4 * kUnit <= columns_; column += 4 * kUnit) sum<4, false>(column);
    for (; column + kUnit <= columns_; column += kUnit) sum<1, false>(column);
    if (column < columns_) sum<1, true>(column);
  }

 private:
  using Vec = typename S::Vec;
  static constexpr int kUnit = 2 * S::kWidth;  // elements of one load_pair
  static constexpr int kAhead = 16;            // rows

  template <int U, bool kTail>
  void sum(int column) const {
    const int tail = columns_ % kUnit;
    Vec sums[2 * U];
#pragma GCC unroll 8
    for (int u = 0; u < 2 * U; ++u) sums[u] = S::zero();
    for (int64_t i = 0; i < rows_; ++i) {
      // Tokens are listed, or lie as [tokens, heads, head_dim]: the next row is far away.
      if (i + kAhead < rows_) prefetch<U * kUnit>(row_(i + kAhead) + column);
      const E* from = row_(i) + column;
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        Vec low, high;
        if constexpr (kTail) {
          S::load_pair_tail(from, tail, low, high);
        } else {
          S::load_pair(from + u * kUnit, low, high);
        }
        sums[2 * u] = S::add(sums[2 * u], low);
        sums[2 * u + 1] = S::add(sums[2 * u + 1], high);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      float lanes[kUnit];
      store_unit<S, E>(finish_(sums[2 * u]), finish_(sums[2 * u + 1]), lanes);
      __builtin_memcpy(to_ + column + u * kUnit, lanes, (kTail ? tail : kUnit) * sizeof(float));
    }
  }

  const int64_t rows_;
  const int columns_;
  const Row& row_;
  const Finish& finish_;
  float* const to_;
};

}  // namespace
}  // namespace adaptive::cpu
