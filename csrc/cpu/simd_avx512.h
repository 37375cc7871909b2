// The SIMD trait of AVX-512 (F, BW, VL, DQ). See simd.h for what each function promises.

#pragma once

// GCC 11 to 13 warn about variables inside their own header (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

struct SimdAvx512 {
  using Vec = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kAccumulators = 16;  // of 32 registers
  static constexpr int kScoredKeys = 4;
  static constexpr bool kFetchesInOrder = false;

  static ADAPTIVE_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static ADAPTIVE_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  static ADAPTIVE_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static ADAPTIVE_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
  static ADAPTIVE_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static ADAPTIVE_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static ADAPTIVE_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static ADAPTIVE_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static ADAPTIVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static ADAPTIVE_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static ADAPTIVE_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static ADAPTIVE_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, 8); }
  static ADAPTIVE_INLINE Vec ldexp(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
  static ADAPTIVE_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static ADAPTIVE_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
  static ADAPTIVE_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }

  static ADAPTIVE_INLINE void reduce4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const Vec abcd =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  static ADAPTIVE_INLINE int append_not_less(Vec a, Vec limit, int32_t first, float* values,
                                             int32_t* positions) {
    const __mmask16 lanes = _mm512_cmp_ps_mask(a, limit, _CMP_NLT_UQ);
    const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(first), order);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(lanes, a));
    _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(lanes, at));
    return __builtin_popcount(lanes);
  }

  static ADAPTIVE_INLINE void load_pair(const Float32* p, Vec& a, Vec& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + kWidth);
  }
  static ADAPTIVE_INLINE void load_pair(const Int8* p, Vec& a, Vec& b) {
    const auto* from = reinterpret_cast<const __m128i*>(p);
    a = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
    b = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
  }
  static ADAPTIVE_INLINE void load_pair(const Bfloat16* p, Vec& a, Vec& b) {
    widen(_mm512_loadu_si512(p), Bfloat16{}, a, b);
  }
  static ADAPTIVE_INLINE void load_pair(const Float16* p, Vec& a, Vec& b) {
    widen(_mm512_loadu_si512(p), Float16{}, a, b);
  }

  static ADAPTIVE_INLINE void load_pair_tail(const Float32* p, int n, Vec& a, Vec& b) {
    const uint32_t lanes = (1u << n) - 1;
    a = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
    b = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> kWidth), p + kWidth);
  }
  template <class E>
  static ADAPTIVE_INLINE void load_pair_tail(const E* p, int n, Vec& a, Vec& b) {
    widen(_mm512_maskz_loadu_epi16((1u << n) - 1, p), E{}, a, b);
  }

 private:
  static ADAPTIVE_INLINE void widen(__m512i x, Bfloat16, Vec& a, Vec& b) {
    a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000)));
  }
  static ADAPTIVE_INLINE void widen(__m512i x, Float16, Vec& a, Vec& b) {
    a = _mm512_cvtph_ps(_mm512_castsi512_si256(x));
    b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
  }
};

}  // namespace
}  // namespace adaptive::cpu
