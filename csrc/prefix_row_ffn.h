// prefix_row_ffn: an FFN of a few rows, each of which uses as many of the first neurons as its
// width says. With x an input row, neuron n holds act(gate[n] * x) * (up[n] * x), or act(up[n] * x)
// where there is no gate; what comes out is the sum over the row's neurons, weighed by `down`.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

constexpr int kMaxPrefixRows = 16;

enum class Activation : int32_t { kSilu, kGeluTanh, kRelu };

struct PrefixRowFfnArgs {
  const void* input;      // [rows, in_features], dtype, last contiguous
  const int64_t* widths;  // [rows], contiguous: neurons of each row
  const void* gate;       // [neurons, in_features], dtype, last contiguous; null: none
  const void* up;         // [neurons, in_features], dtype, last contiguous
  const void* down;       // [out_features, neurons], dtype, last contiguous
  void* out;              // [rows, out_features], dtype, contiguous
  DType dtype;            // float32, float16 or bfloat16
  Activation activation;
  int64_t rows;         // 0..kMaxPrefixRows
  int64_t neurons;      // a multiple of 8
  int64_t in_features;  // a multiple of 8, at least 32
  int64_t out_features;
  int64_t input_stride, gate_stride, up_stride, down_stride;  // of a row
};

namespace cpu {

/// Widths are in 0..neurons. Each row's results depend on that row alone, and not on the number of
/// threads, bit for bit, if weights are finite.
void prefix_row_ffn(const PrefixRowFfnArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of device memory that prefix_row_ffn needs.
int64_t prefix_row_ffn_workspace_bytes(const PrefixRowFfnArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe: widths stay on the device, where one out
/// of range is taken for the nearest in range. Each row's results depend on that row alone, if
/// weights are finite. Throws if the workspace is too small or a launch is refused.
void prefix_row_ffn(const PrefixRowFfnArgs& args, void* workspace, int64_t workspace_bytes,
                    Stream stream);

}  // namespace cuda
}  // namespace adaptive
