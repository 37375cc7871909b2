// What the SIMD traits share: the element types of a KV cache, and exp and tanh written on a trait.
//
// A trait is a struct of static functions on `Vec`, kWidth floats. Its loads come in pairs, 2 *
// kWidth elements at a time, because 16-bit elements fill one register with that many:
//   load_pair(p, a, b)          both vectors from p; for bfloat16 the even, then the odd elements
//   load_pair_tail(p, n, a, b)  the same of the first n < 2 * kWidth elements, n a multiple of 8;
//                               reads nothing beyond them and sets the other lanes to 0
//   max(a, b), min(a, b)        b where either is NaN
//   select_less(a, b, x, y)     x where a < b, y elsewhere and where either is NaN
//   ldexp(a, n)                 a * 2^n for whole n in -126..127, anything beyond
//   reduce4(a, b, c, d, out)    the four sums over lanes, each in the same order of additions
//   append_not_less(a, limit, first, values, positions)
//                               the lanes not below limit, NaN included, and first + lane of each,
//                               one after another; returns how many, may write kWidth elements
//
// Everything lives in an anonymous namespace and nothing of the standard library is called: a
// function with external linkage, compiled here for AVX-512, could be the copy that the linker
// keeps for every other file.

#pragma once

#include <cstdint>

#define ADAPTIVE_INLINE inline __attribute__((always_inline))

namespace adaptive::cpu {
namespace {

struct Bfloat16 {
  static constexpr bool kInterleaved = true;  // load_pair gives even, odd instead of low, high
  uint16_t bits;
};

struct Float16 {
  static constexpr bool kInterleaved = false;
  uint16_t bits;
};

struct Float32 {
  static constexpr bool kInterleaved = false;
  float value;
};

/// A weight that a factor of its group belongs to. No tails: a group is a multiple of every pair.
struct Int8 {
  static constexpr bool kInterleaved = false;
  int8_t value;
};

constexpr float kInfinity = __builtin_inff();
constexpr int kCacheLine = 64;

/// Prefetches the cache lines of kCount elements, to the second level of cache; to the first where
/// kLocality is 3.
template <int kCount, int kLocality = 2, class E>
ADAPTIVE_INLINE void prefetch(const E* row) {
  constexpr int kBytes = kCount * sizeof(E);
#pragma GCC unroll 8
  for (int i = 0; i < kBytes; i += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + i, 0, kLocality);
  }
}

/// Stores what load_pair made of 2 * kWidth elements of type E, in their order.
template <class S, class E>
ADAPTIVE_INLINE void store_unit(typename S::Vec low, typename S::Vec high, float* to) {
  float lows[S::kWidth], highs[S::kWidth];
  S::store(lows, low);
  S::store(highs, high);
#pragma GCC unroll 16
  for (int i = 0; i < S::kWidth; ++i) {
    to[E::kInterleaved ? 2 * i : i] = lows[i];
    to[E::kInterleaved ? 2 * i + 1 : i + S::kWidth] = highs[i];
  }
}

/// exp(x) to about one ulp for x up to 88; exactly 0 below -87, so also for -inf; NaN for NaN.
/// Range reduction and polynomial of Cephes' expf (Moshier, 1992).
template <class S>
ADAPTIVE_INLINE typename S::Vec exp(typename S::Vec x) {
  const auto n = S::round(S::mul(x, S::set1(1.44269504088896341f)));
  auto r = S::fma(n, S::set1(-0.693359375f), x);
  r = S::fma(n, S::set1(2.12194440e-4f), r);
  auto p = S::set1(1.9875691500e-4f);
  p = S::fma(p, r, S::set1(1.3981999507e-3f));
  p = S::fma(p, r, S::set1(8.3334519073e-3f));
  p = S::fma(p, r, S::set1(4.1665795894e-2f));
  p = S::fma(p, r, S::set1(1.6666665459e-1f));
  p = S::fma(p, r, S::set1(5.0000001201e-1f));
  p = S::fma(S::mul(r, r), p, S::add(r, S::set1(1.0f)));
  return S::select_less(x, S::set1(-87.0f), S::zero(), S::ldexp(p, n));
}

/// tanh(x) to about two ulp; NaN for NaN. Cephes' tanhf (Moshier, 1992).
template <class S>
ADAPTIVE_INLINE typename S::Vec tanh(typename S::Vec x) {
  const auto magnitude = S::max(x, S::sub(S::zero(), x));
  const auto square = S::mul(x, x);
  auto p = S::set1(-5.70498872745e-3f);
  p = S::fma(p, square, S::set1(2.06390887954e-2f));
  p = S::fma(p, square, S::set1(-5.37397155531e-2f));
  p = S::fma(p, square, S::set1(1.33314422036e-1f));
  p = S::fma(p, square, S::set1(-3.33332819422e-1f));
  const auto small = S::fma(S::mul(p, square), x, x);

  const auto one = S::set1(1.0f);
  const auto capped = S::min(S::set1(10.0f), magnitude);  // tanh(10) rounds to 1
  const auto quotient = S::div(S::set1(2.0f), S::add(exp<S>(S::add(capped, capped)), one));
  const auto large = S::sub(one, quotient);
  const auto with_sign = S::select_less(x, S::zero(), S::sub(S::zero(), large), large);
  return S::select_less(magnitude, S::set1(0.625f), small, with_sign);
}

}  // namespace
}  // namespace adaptive::cpu
