// sparse_row_ffn on the CPU: neurons are cut into parts, whose sums are added in order.

#include "sparse_row_ffn.h"

#include <algorithm>

#include "cpu/decode_schedule.h"
#include "cpu/level.h"
#include "cpu/sparse_row_ffn_kernel.h"

namespace adaptive::cpu {
namespace {

const SparseKernel& kernel_for(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return kSparseAvx512;
  if (level == Level::kAvx2) return kSparseAvx2;
#endif
  (void)level;
  return kSparseBase;
}

/// Bytes that the call reads if one neuron in sixteen is active: enough to choose threads by.
int64_t expected_bytes(const SparseRowFfnArgs& args) {
  const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  return args.neurons * (args.in_features + args.out_features) * element_bytes / 16;
}

}  // namespace

void sparse_row_ffn(const SparseRowFfnArgs& args) {
  if (args.rows == 0) return;
  const SparseKernel& kernel = kernel_for(cpu::level());
  const int64_t in_width = round_up(args.in_features, kSparseWidth);
  const int64_t out_width = round_up(args.out_features, kSparseWidth);
  const int64_t parts = args.parts(kSparsePart), size = args.rows * out_width;
  const AlignedFloats input = aligned_floats(args.rows * in_width);
  const AlignedFloats sums = aligned_floats(std::max<int64_t>(parts, 1) * size);
  for (int64_t row = 0; row < args.rows; ++row) {
    kernel.widen(args, row, input.get() + row * in_width);
  }
  const int threads = useful_threads(parts, expected_bytes(args));
  // Parts differ in how many neurons are active: whoever is free takes the next.
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part) {
    kernel.run(args, {.input = input.get(),
                      .in_width = in_width,
                      .out_width = out_width,
                      .begin = part * kSparsePart,
                      .end = std::min((part + 1) * kSparsePart, args.neurons),
                      .sums = sums.get() + part * size});
  }
  if (parts == 0) std::fill_n(sums.get(), size, 0.0f);
  for (int64_t part = 1; part < parts; ++part) {
    const float* piece = sums.get() + part * size;
    for (int64_t i = 0; i < size; ++i) sums.get()[i] += piece[i];
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    kernel.narrow(args, row, sums.get() + row * out_width);
  }
}

}  // namespace adaptive::cpu
