// Widens one element to a float.

#pragma once

#include "cpu/simd.h"
#include "skinny_linear.h"

namespace adaptive::cpu {
namespace {

ADAPTIVE_INLINE float widen_one(Float32 x) { return x.value; }

ADAPTIVE_INLINE float widen_one(Bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

ADAPTIVE_INLINE float widen_one(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  bits += magnitude >= 0x7c00u ? 112u << 23 : 0u;  // inf and NaN keep an exponent of all ones
  const uint32_t small = 0u - static_cast<uint32_t>(magnitude < 0x400u);
  bits = (__builtin_bit_cast(uint32_t, tiny) & small) | (bits & ~small);
  return __builtin_bit_cast(float, bits | (x.bits & 0x8000u) << 16);
}

ADAPTIVE_INLINE float bias_of(const SkinnyLinearArgs& args, int64_t feature) {
  switch (args.dtype) {
    case DType::kFloat32: return widen_one(static_cast<const Float32*>(args.bias)[feature]);
    case DType::kFloat16: return widen_one(static_cast<const Float16*>(args.bias)[feature]);
    default: return widen_one(static_cast<const Bfloat16*>(args.bias)[feature]);
  }
}

}  // namespace
}  // namespace adaptive::cpu
