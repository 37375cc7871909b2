// Rounds a float to an element type, ties to even; NaN stays NaN.

#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

ADAPTIVE_INLINE void narrow(float x, Float32* to) { to->value = x; }

ADAPTIVE_INLINE void narrow(float x, Bfloat16* to) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;  // ties to even
  to->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

ADAPTIVE_INLINE void narrow(float x, Float16* to) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Without branches, so that loops over this become vectors. 0.5 has a subnormal's last place.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  const uint32_t even = 0xfffu + (magnitude >> 13 & 1);  // ties to even
  const uint32_t normal = (magnitude - (112u << 23) + even) >> 13;
  const uint32_t small = 0u - static_cast<uint32_t>(magnitude < 0x38800000u);
  uint32_t made = (subnormal & small) | (normal & ~small);
  made = magnitude >= 0x477ff000u ? 0x7c00u : made;  // rounds to 2^16 or is beyond
  made = magnitude > 0x7f800000u ? 0x7e00u : made;
  to->bits = static_cast<uint16_t>(made | (bits >> 16 & 0x8000u));
}

}  // namespace
}  // namespace adaptive::cpu
