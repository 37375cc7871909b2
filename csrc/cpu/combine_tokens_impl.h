// The kernel of combine_tokens: a loop that compilers turn into vectors of the instruction set they
// compile for, with any width.

#pragma once

#include "cpu/combine_tokens_kernel.h"
#include "cpu/narrow.h"
#include "cpu/widen.h"

namespace adaptive::cpu {
namespace {

template <class E>
ADAPTIVE_INLINE void combine_elements(int64_t width, const CombineRow& row) {
  const auto* hidden = static_cast<const E*>(row.hidden);
  const auto* update = static_cast<const E*>(row.update);
  auto* out = static_cast<E*>(row.out);
  const float weight = row.weight;
#pragma GCC ivdep  // an element depends on none but itself, also where out is hidden
  for (int64_t i = 0; i < width; ++i) {
    narrow(widen_one(hidden[i]) + weight * widen_one(update[i]), out + i);
  }
}

ADAPTIVE_INLINE void combine_row(DType dtype, int64_t width, const CombineRow& row) {
  switch (dtype) {
    case DType::kFloat32: return combine_elements<Float32>(width, row);
    case DType::kFloat16: return combine_elements<Float16>(width, row);
    default: return combine_elements<Bfloat16>(width, row);
  }
}

}  // namespace
}  // namespace adaptive::cpu
