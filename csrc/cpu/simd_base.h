// The SIMD trait of any architecture, in the compiler's vector extensions: SSE2, NEON. See simd.h
// for what each function promises.

#pragma once

#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

struct SimdBase {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kAccumulators = 8;  // of 16 registers
  static constexpr int kScoredKeys = 2;
  static constexpr bool kFetchesInOrder = false;

  static ADAPTIVE_INLINE Vec zero() { return Vec{}; }
  static ADAPTIVE_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
  static ADAPTIVE_INLINE Vec load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
  static ADAPTIVE_INLINE void store(float* p, Vec a) { *reinterpret_cast<Floats*>(p) = a; }
  static ADAPTIVE_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static ADAPTIVE_INLINE Vec sub(Vec a, Vec b) { return a - b; }
  static ADAPTIVE_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  static ADAPTIVE_INLINE Vec div(Vec a, Vec b) { return a / b; }
  static ADAPTIVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static ADAPTIVE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static ADAPTIVE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static ADAPTIVE_INLINE Vec round(Vec a) { return (a + kRounder) - kRounder; }
  static ADAPTIVE_INLINE Vec ldexp(Vec a, Vec n) {
    // The low bits of n + kRounder are n; its other bits leave by the shift.
    const Ints exponent = reinterpret_cast<Ints>(n + kRounder) + 127;
    return a * reinterpret_cast<Vec>(exponent << 23);
  }
  static ADAPTIVE_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) { return a < b ? x : y; }
  static ADAPTIVE_INLINE float reduce_max(Vec a) {
    const float low = a[0] > a[1] ? a[0] : a[1];
    const float high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
  }
  static ADAPTIVE_INLINE float reduce_add(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

  static ADAPTIVE_INLINE void reduce4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = reduce_add(a);
    out[1] = reduce_add(b);
    out[2] = reduce_add(c);
    out[3] = reduce_add(d);
  }

  static ADAPTIVE_INLINE int append_not_less(Vec a, Vec limit, int32_t first, float* values,
                                             int32_t* positions) {
    const auto below = a < limit;  // -1 where true
    int count = 0;
    for (int lane = 0; lane < kWidth; ++lane) {
      values[count] = a[lane];
      positions[count] = first + lane;
      count += 1 + below[lane];
    }
    return count;
  }

  static ADAPTIVE_INLINE void load_pair(const Float32* p, Vec& a, Vec& b) {
    a = load(&p->value);
    b = load(&p[kWidth].value);
  }
  static ADAPTIVE_INLINE void load_pair(const Int8* p, Vec& a, Vec& b) {
    a = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Vec);
    b = __builtin_convertvector(*reinterpret_cast<const Bytes*>(p + kWidth), Vec);
  }
  static ADAPTIVE_INLINE void load_pair(const Bfloat16* p, Vec& a, Vec& b) {
    const Ints x = *reinterpret_cast<const Pairs*>(p);
    a = reinterpret_cast<Vec>(x << 16);
    b = reinterpret_cast<Vec>(x & 0xffff0000u);
  }
  static ADAPTIVE_INLINE void load_pair(const Float16* p, Vec& a, Vec& b) {
    a = widen(*reinterpret_cast<const Halves*>(p));
    b = widen(*reinterpret_cast<const Halves*>(p + kWidth));
  }

  // A pair is 8 elements, so there are no tails.
  template <class E>
  static ADAPTIVE_INLINE void load_pair_tail(const E*, int, Vec& a, Vec& b) {
    a = b = zero();
  }

 private:
  typedef uint32_t Ints __attribute__((vector_size(16)));
  // Views of memory that is aligned to its elements only.
  typedef float Floats __attribute__((vector_size(16), aligned(4), may_alias));
  typedef uint32_t Pairs __attribute__((vector_size(16), aligned(2), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(8), aligned(2), may_alias));
  typedef int8_t Bytes __attribute__((vector_size(4), aligned(1), may_alias));

  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers

  static ADAPTIVE_INLINE Vec widen(Halves halves) {
    typedef int32_t Signed __attribute__((vector_size(16)));
    const Ints x = __builtin_convertvector(halves, Ints);
    const Ints magnitude = x & 0x7fffu;
    const Ints rebias = Ints{} + (112u << 23);
    const Ints normal = (magnitude << 13) + rebias;
    const Ints special = normal + rebias;  // inf and NaN keep an exponent of all ones
    const Vec tiny = __builtin_convertvector(reinterpret_cast<Signed>(magnitude), Vec) * 0x1p-24f;
    Ints bits = magnitude >= 0x7c00u ? special : normal;
    bits = magnitude < 0x400u ? reinterpret_cast<Ints>(tiny) : bits;
    return reinterpret_cast<Vec>(bits | (x & 0x8000u) << 16);
  }
};

}  // namespace
}  // namespace adaptive::cpu
