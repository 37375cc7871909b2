// What every op on linear_features.h does first: widen the input, and choose the number of threads.

#pragma once

#include "cpu/decode_schedule.h"
#include "cpu/level.h"
#include "skinny_linear.h"

namespace adaptive::cpu {

/// Input rows as the kernels of one instruction set read them: float, each padded with zeros to
/// `width`.
struct LinearInput {
  AlignedFloats floats;
  int64_t width;
};

LinearInput linear_input(const SkinnyLinearArgs& args, Level level);

/// Threads that are worth waking to read the weight in `pieces`.
int linear_threads(const SkinnyLinearArgs& args, int64_t pieces);

}  // namespace adaptive::cpu
