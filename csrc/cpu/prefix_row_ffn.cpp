// prefix_row_ffn on the CPU: two passes, over neurons and over output features.

#include "prefix_row_ffn.h"

#include <algorithm>
#include <cstring>

#include "cpu/linear_input.h"
#include "cpu/prefix_row_ffn_kernel.h"

namespace adaptive::cpu {
namespace {

constexpr int64_t kStep = 8;  // output features: a thread's stretch starts at a multiple of it

const PrefixKernel& kernel_for(Level level) {
#if defined(__x86_64__)
  if (level == Level::kAvx512Bf16) return kPrefixAvx512Bf16;
  if (level == Level::kAvx512) return kPrefixAvx512;
  if (level == Level::kAvx2) return kPrefixAvx2;
#endif
  (void)level;
  return kPrefixBase;
}

/// The rows that use any neuron, from the widest on; of equal ones the first comes first.
PrefixRows order_rows(const PrefixRowFfnArgs& args) {
  PrefixRows rows;
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.widths[row] > 0) rows.order[rows.count++] = row;
  }
  std::stable_sort(rows.order, rows.order + rows.count,
                   [&](int64_t a, int64_t b) { return args.widths[a] > args.widths[b]; });
  for (int64_t place = 0; place < rows.count; ++place) {
    rows.widths[place] = args.widths[rows.order[place]];
  }
  rows.padded = linear_rows(rows.count);
  return rows;
}

}  // namespace

void prefix_row_ffn(const PrefixRowFfnArgs& args) {
  const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t row_bytes = args.out_features * element_bytes;
  PrefixRows rows = order_rows(args);
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.widths[row] == 0)
      std::memset(static_cast<char*>(args.out) + row * row_bytes, 0, row_bytes);
  }
  if (rows.count == 0 || args.out_features == 0) return;
  const Level level = cpu::level();
  const PrefixKernel& kernel = kernel_for(level);
  SkinnyLinearArgs source{};
  source.input = args.input;
  source.input_stride = args.input_stride;
  source.dtype = args.dtype;
  source.rows = args.rows;
  source.in_features = args.in_features;
  const LinearInput input =
      linear_input(source, {rows.order, static_cast<size_t>(rows.count)}, level);
  rows.input = input.floats.get();
  rows.input_width = input.width;
  rows.hidden_width = round_up(rows.widths[0], kPrefixNeurons);
  const AlignedFloats hidden = aligned_floats(rows.padded * rows.hidden_width);
  rows.hidden = hidden.get();

  const int64_t chunks = rows.hidden_width / kPrefixNeurons;
  const int64_t matrices = args.gate != nullptr ? 2 : 1;
  const int64_t read = rows.widths[0] * args.in_features * element_bytes * matrices;
  const int readers = useful_threads(chunks, read);
  // The first neurons are those of more rows: whoever is free takes the next.
#pragma omp parallel for schedule(dynamic) num_threads(readers) if (readers > 1)
  for (int64_t i = 0; i < chunks; ++i) kernel.activate(args, rows, i * kPrefixNeurons);

  const int64_t steps = (args.out_features + kStep - 1) / kStep;
  const int64_t threads = useful_threads(steps, rows.widths[0] * row_bytes);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t begin = i * steps / threads * kStep, end = (i + 1) * steps / threads * kStep;
    kernel.project(args, rows, begin, std::min(end, args.out_features));
  }
}

}  // namespace adaptive::cpu
