// The SIMD trait of AVX-512 with BF16, whose products of bfloat16 need no widening: see simd.h.

#pragma once

#include "cpu/simd_avx512.h"

namespace adaptive::cpu {
namespace {

struct SimdAvx512Bf16 : SimdAvx512 {
  using Pairs = __m512bh;
  // Zen 4 reads four rows in turns more slowly than one stretch of memory.
  static constexpr bool kFetchesInOrder = true;

  static ADAPTIVE_INLINE Pairs load_pairs(const Bfloat16* p) {
    return as_pairs(_mm512_loadu_si512(p));
  }
  static ADAPTIVE_INLINE Pairs load_pairs_tail(const Bfloat16* p, int n) {
    return as_pairs(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  static ADAPTIVE_INLINE Vec as_floats(Pairs a) { return __builtin_bit_cast(Vec, a); }
  static ADAPTIVE_INLINE Vec dot(Vec sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

 private:
  static ADAPTIVE_INLINE Pairs as_pairs(__m512i x) { return __builtin_bit_cast(Pairs, x); }
};

}  // namespace
}  // namespace adaptive::cpu
