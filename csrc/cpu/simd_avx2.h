// The SIMD trait of AVX2, FMA and F16C. See simd.h for what each function promises.

#pragma once

#include <immintrin.h>

#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

struct SimdAvx2 {
  using Vec = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kAccumulators = 8;  // of 16 registers
  static constexpr int kScoredKeys = 2;
  static constexpr bool kFetchesInOrder = false;

  static ADAPTIVE_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static ADAPTIVE_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
  static ADAPTIVE_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static ADAPTIVE_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
  static ADAPTIVE_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static ADAPTIVE_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static ADAPTIVE_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static ADAPTIVE_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static ADAPTIVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static ADAPTIVE_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static ADAPTIVE_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static ADAPTIVE_INLINE Vec round(Vec a) { return _mm256_round_ps(a, 8); }
  static ADAPTIVE_INLINE Vec ldexp(Vec a, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static ADAPTIVE_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static ADAPTIVE_INLINE float reduce_max(Vec a) {
    const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 y = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }
  static ADAPTIVE_INLINE float reduce_add(Vec a) {
    const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }

  static ADAPTIVE_INLINE void reduce4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const Vec abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }

  static ADAPTIVE_INLINE int append_not_less(Vec a, Vec limit, int32_t first, float* values,
                                             int32_t* positions) {
    auto lanes = static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, limit, _CMP_NLT_UQ)));
    if (lanes == 0) return 0;
    float all[kWidth];
    store(all, a);
    int count = 0;
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      values[count] = all[lane];
      positions[count++] = first + lane;
    }
    return count;
  }

  static ADAPTIVE_INLINE void load_pair(const Float32* p, Vec& a, Vec& b) {
    a = load(&p->value);
    b = load(&p[kWidth].value);
  }
  static ADAPTIVE_INLINE void load_pair(const Int8* p, Vec& a, Vec& b) {
    const auto* from = reinterpret_cast<const __m128i*>(p);
    a = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from)));
    b = _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + kWidth))));
  }
  static ADAPTIVE_INLINE void load_pair(const Bfloat16* p, Vec& a, Vec& b) {
    widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Bfloat16{}, a, b);
  }
  static ADAPTIVE_INLINE void load_pair(const Float16* p, Vec& a, Vec& b) {
    widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Float16{}, a, b);
  }

  // A tail is 8 elements: the only multiple of 8 below 2 * kWidth.
  static ADAPTIVE_INLINE void load_pair_tail(const Float32* p, int, Vec& a, Vec& b) {
    a = load(&p->value);
    b = zero();
  }
  template <class E>
  static ADAPTIVE_INLINE void load_pair_tail(const E* p, int, Vec& a, Vec& b) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    widen(_mm256_zextsi128_si256(x), E{}, a, b);
  }

 private:
  static ADAPTIVE_INLINE void widen(__m256i x, Bfloat16, Vec& a, Vec& b) {
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000)));
  }
  static ADAPTIVE_INLINE void widen(__m256i x, Float16, Vec& a, Vec& b) {
    a = _mm256_cvtph_ps(_mm256_castsi256_si128(x));
    b = _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1));
  }
};

}  // namespace
}  // namespace adaptive::cpu
