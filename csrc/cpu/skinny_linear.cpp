// skinny_linear on the CPU: every thread streams one stretch of the weight's rows.

#include "skinny_linear.h"

#include <algorithm>
#include <numeric>

#include "cpu/level.h"
#include "cpu/linear_input.h"
#include "cpu/skinny_linear_kernel.h"

namespace adaptive::cpu {
namespace {

constexpr int kMaxLinearRows = 16;
constexpr int64_t kStep = 8;  // features: a thread's stretch starts at a multiple of it

const LinearKernel& kernel_for(Level level) {
#if defined(__x86_64__)
  if (level == Level::kAvx512Bf16) return kLinearAvx512Bf16;
  if (level == Level::kAvx512) return kLinearAvx512;
  if (level == Level::kAvx2) return kLinearAvx2;
#endif
  (void)level;
  return kLinearBase;
}

}  // namespace

LinearInput linear_input(const SkinnyLinearArgs& args, std::span<const int64_t> rows, Level level) {
  const LinearKernel& kernel = kernel_for(level);
  const bool dots = kernel.dots && args.dtype == DType::kBfloat16 && args.weight_scales == nullptr;
  const int64_t width = round_up(args.in_features, kLinearWidth) / (dots ? 2 : 1);  // in floats
  const auto count = static_cast<int64_t>(rows.size());
  LinearInput made{aligned_floats(linear_rows(count) * width), width};
  // A thread's share of this would cost less than the barrier behind it.
  for (int64_t place = 0; place < linear_rows(count); ++place) {
    const int64_t row = place < count ? rows[place] : args.rows;
    kernel.widen(args, row, made.floats.get() + place * width);
  }
  return made;
}

LinearInput linear_input(const SkinnyLinearArgs& args, Level level) {
  int64_t rows[kMaxLinearRows];
  std::iota(rows, rows + args.rows, 0);
  return linear_input(args, {rows, static_cast<size_t>(args.rows)}, level);
}

int linear_threads(const SkinnyLinearArgs& args, int64_t pieces) {
  const int64_t element_bytes = args.weight_scales != nullptr   ? 1
                                : args.dtype == DType::kFloat32 ? 4
                                                                : 2;
  return useful_threads(pieces, args.out_features * args.in_features * element_bytes);
}

void skinny_linear(const SkinnyLinearArgs& args) {
  if (args.rows == 0 || args.out_features == 0) return;
  const Level level = cpu::level();
  const LinearKernel& kernel = kernel_for(level);
  const int64_t steps = (args.out_features + kStep - 1) / kStep;
  const int64_t threads = linear_threads(args, steps);
  const LinearInput input = linear_input(args, level);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t begin = i * steps / threads * kStep, end = (i + 1) * steps / threads * kStep;
    kernel.multiply(args, input.floats.get(), input.width, begin, std::min(end, args.out_features));
  }
}

}  // namespace adaptive::cpu
