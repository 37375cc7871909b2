// What skinny_linear.cpp asks of one instruction set. Included by every instruction set's file:
// nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "skinny_linear.h"

namespace adaptive::cpu {

constexpr int kLinearRows = 4;    // input rows that share each load of a weight
constexpr int kLinearWidth = 32;  // two of the widest vectors: no kernel's rows are padded further

struct LinearKernel {
  /// Writes input row `row` as the kernel reads it, padded with zeros to a multiple of
  /// kLinearWidth: as float in its own order, or as it is where `dots` applies. A row beyond the
  /// last is zeros.
  void (*widen)(const SkinnyLinearArgs& args, int64_t row, float* to);
  /// Computes output features [begin, end) of every row. `input` is what widen made, `width` floats
  /// to a row, of all rows and, where the last tile of kLinearRows lacks just one, of that one.
  void (*multiply)(const SkinnyLinearArgs& args, const float* input, int64_t width, int64_t begin,
                   int64_t end);
  /// Whether weights and inputs of bfloat16 are multiplied as they are.
  bool dots;
};

extern const LinearKernel kLinearBase, kLinearAvx2, kLinearAvx512, kLinearAvx512Bf16;

}  // namespace adaptive::cpu
