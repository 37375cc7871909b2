// exit_confidence on the CPU: every thread summarises a stretch of the vocabulary, slice by slice.

#include "exit_confidence.h"

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/exit_confidence_kernel.h"
#include "cpu/level.h"
#include "cpu/linear_input.h"

namespace adaptive::cpu {
namespace {

/// Writes the results of `row`. In double, where one slice after another costs no precision.
void merge(const ExitConfidenceArgs& args, const std::vector<ExitSlice>& slices, int64_t row) {
  const auto count = static_cast<int64_t>(slices.size());
  TopLogits best = kNoLogits;
  for (int64_t i = row; i < count; i += args.linear.rows) {
    const TopLogits& of = slices[i].best;
    for (int place = 0; place < 2 && of.tokens[place] >= 0; ++place) {
      offer(best, of.top[place], of.tokens[place]);
    }
  }
  const float max = best.top[0];
  double sum = 0, weighted = 0;
  for (int64_t i = row; i < count && std::isfinite(max); i += args.linear.rows) {
    const ExitSlice& slice = slices[i];
    if (std::isinf(slice.best.top[0])) continue;  // below max: nothing but -inf
    const double shift = static_cast<double>(slice.best.top[0]) - max, weight = std::exp(shift);
    sum += weight * slice.sum;
    weighted += weight * (slice.weighted + shift * slice.sum);
  }
  for (int place = 0; place < 2; ++place) {
    args.tokens[row * 2 + place] = best.tokens[place];
    args.top[row * 2 + place] = best.top[place];
  }
  const bool finite = std::isfinite(max);
  args.lse[row] = finite ? static_cast<float>(max + std::log(sum)) : max;
  args.entropy[row] = finite ? static_cast<float>(std::log(sum) - weighted / sum)
                             : std::numeric_limits<float>::quiet_NaN();
}

ExitKernel kernel_for(Level level) {
#if defined(__x86_64__)
  if (level == Level::kAvx512Bf16) return &summarise_slices_avx512bf16;
  if (level == Level::kAvx512) return &summarise_slices_avx512;
  if (level == Level::kAvx2) return &summarise_slices_avx2;
#endif
  (void)level;
  return &summarise_slices_base;
}

}  // namespace

void exit_confidence(const ExitConfidenceArgs& args) {
  const int64_t rows = args.linear.rows;
  if (rows == 0) return;
  const Level level = cpu::level();
  const ExitKernel kernel = kernel_for(level);
  const LinearInput input = linear_input(args.linear, level);
  const int64_t count = (args.linear.out_features + kSliceTokens - 1) / kSliceTokens;
  const int threads = linear_threads(args.linear, count);
  std::vector<ExitSlice> slices(count * rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t begin = i * count / threads, end = (i + 1) * count / threads;
    kernel(args, input.floats.get(), input.width, begin, end, slices.data());
  }
  // A thread's share of this would cost less than another barrier.
  for (int64_t row = 0; row < rows; ++row) merge(args, slices, row);
}

}  // namespace adaptive::cpu
