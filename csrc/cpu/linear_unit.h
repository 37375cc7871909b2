// A unit of elements, as many as 16-bit ones fill a vector, in the form in which they are
// multiplied.

#pragma once

#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

/// Whether a trait multiplies elements of type E as they are, neighbours in pairs.
template <class S, class E>
concept DotsPairs =
    requires(const E* p, typename S::Vec sum) { S::dot(sum, S::load_pairs(p), S::load_pairs(p)); };

/// Widened to two vectors of floats, which rows of the input are already.
template <class S, class E, bool kWiden = !DotsPairs<S, E>>
struct LinearUnit {
  using Vec = typename S::Vec;
  static constexpr int kElements = 2 * S::kWidth;
  static constexpr int kInputFloats = kElements;  // that hold a unit of the input

  Vec low, high;

  ADAPTIVE_INLINE void load(const E* p) { S::load_pair(p, low, high); }
  ADAPTIVE_INLINE void load_tail(const E* p, int n) { S::load_pair_tail(p, n, low, high); }
  ADAPTIVE_INLINE void load_input(const float* p) {
    low = S::load(p);
    high = S::load(p + S::kWidth);
  }
  ADAPTIVE_INLINE void store_input(float* p) const {
    S::store(p, low);
    S::store(p + S::kWidth, high);
  }
  ADAPTIVE_INLINE void scale(float factor) {
    low = S::mul(low, S::set1(factor));
    high = S::mul(high, S::set1(factor));
  }
  ADAPTIVE_INLINE Vec add_product(const LinearUnit& input, Vec sum) const {
    return S::fma(input.high, high, S::fma(input.low, low, sum));
  }
};

/// As it lies in memory, in the input, too.
template <class S, class E>
struct LinearUnit<S, E, false> {
  using Vec = typename S::Vec;
  static constexpr int kElements = 2 * S::kWidth;
  static constexpr int kInputFloats = S::kWidth;

  typename S::Pairs pairs;

  ADAPTIVE_INLINE void load(const E* p) { pairs = S::load_pairs(p); }
  ADAPTIVE_INLINE void load_tail(const E* p, int n) { pairs = S::load_pairs_tail(p, n); }
  ADAPTIVE_INLINE void load_input(const float* p) { load(reinterpret_cast<const E*>(p)); }
  ADAPTIVE_INLINE void store_input(float* p) const { S::store(p, S::as_floats(pairs)); }
  ADAPTIVE_INLINE Vec add_product(const LinearUnit& input, Vec sum) const {
    return S::dot(sum, input.pairs, pairs);
  }
};

}  // namespace
}  // namespace adaptive::cpu
