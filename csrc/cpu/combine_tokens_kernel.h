// What combine_tokens.cpp asks of one instruction set. Included by every instruction set's file:
// nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive::cpu {

/// One row: out[i] = hidden[i] + weight * update[i]. `out` is `hidden` or does not overlap it.
struct CombineRow {
  const void* hidden;
  const void* update;
  void* out;
  float weight;
};

using CombineKernel = void (*)(DType dtype, int64_t width, const CombineRow& row);

void combine_row_base(DType dtype, int64_t width, const CombineRow& row);
void combine_row_avx2(DType dtype, int64_t width, const CombineRow& row);
void combine_row_avx512(DType dtype, int64_t width, const CombineRow& row);

}  // namespace adaptive::cpu
