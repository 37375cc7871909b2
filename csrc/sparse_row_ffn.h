// sparse_row_ffn: the up and down projections of a gated FFN, of those neurons that are active.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

/// Neurons [i * kSparsePart, ...) are one part: a row's sums are taken part by part.
constexpr int64_t kSparsePart = 512;

struct SparseRowFfnArgs {
  const void* activations;  // [rows, neurons], dtype, last contiguous; 0: not active
  const void* input;        // [rows, in_features], dtype, last contiguous
  const void* up;           // [neurons, in_features], dtype, last contiguous
  const void* down;         // [neurons, out_features], dtype, last contiguous: transposed
  void* out;                // [rows, out_features], dtype, contiguous
  DType dtype;              // float32, float16 or bfloat16
  int64_t rows;             // 0..16
  int64_t neurons;
  int64_t in_features;                                               // a multiple of 8, at least 32
  int64_t out_features;                                              // likewise
  int64_t activations_stride, input_stride, up_stride, down_stride;  // of a row

  int64_t parts(int64_t part) const { return (neurons + part - 1) / part; }
};

namespace cpu {

/// Each row's results depend on that row alone, and not on the number of threads, bit for bit.
void sparse_row_ffn(const SparseRowFfnArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of device memory that sparse_row_ffn needs.
int64_t sparse_row_ffn_workspace_bytes(const SparseRowFfnArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. Each row's results depend on that row
/// alone. Throws if the workspace is too small or a launch is refused.
void sparse_row_ffn(const SparseRowFfnArgs& args, void* workspace, int64_t workspace_bytes,
                    Stream stream);

}  // namespace cuda
}  // namespace adaptive
