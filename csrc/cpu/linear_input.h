// What every op on linear_features.h does first: widen the input, and choose the number of threads.

#pragma once

#include <span>

#include "cpu/decode_schedule.h"
#include "cpu/level.h"
#include "cpu/skinny_linear_kernel.h"
#include "skinny_linear.h"

namespace adaptive::cpu {

/// Input rows as the kernels of one instruction set read them, each padded with zeros to `width`
/// floats.
struct LinearInput {
  AlignedFloats floats;
  int64_t width;
};

LinearInput linear_input(const SkinnyLinearArgs& args, Level level);

/// The same of some rows alone, in this order.
LinearInput linear_input(const SkinnyLinearArgs& args, std::span<const int64_t> rows, Level level);

/// Rows that a kernel reads: where the last tile lacks just one, that one, too.
inline int64_t linear_rows(int64_t rows) { return rows + (rows % kLinearRows == kLinearRows - 1); }

/// Threads that are worth waking to read the weight in `pieces`.
int linear_threads(const SkinnyLinearArgs& args, int64_t pieces);

}  // namespace adaptive::cpu
