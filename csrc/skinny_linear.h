// skinny_linear: a linear layer of a few rows, bound by reading its weight.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct SkinnyLinearArgs {
  const void* input;    // [rows, in_features], dtype, last contiguous
  const void* weight;   // [out_features, in_features], dtype or int8, last contiguous
  const void* bias;     // [out_features], dtype, contiguous; null: none
  void* out;            // [rows, out_features], dtype, contiguous
  DType dtype;          // float32, float16 or bfloat16
  int64_t rows;         // 0..16
  int64_t in_features;  // a multiple of 8, at least 32
  int64_t out_features;
  int64_t input_stride;   // of a row
  int64_t weight_stride;  // of a row
  // Of int8 weights: one factor for each `group` neighbouring weights of a row. Null: of dtype.
  const float* weight_scales;  // [out_features, in_features / group], last contiguous
  int64_t scales_stride;       // of a row
  int64_t group;               // a power of two from 32 on that divides in_features
};

namespace cpu {

/// Each row's results depend on that row alone, and not on the number of threads, bit for bit.
void skinny_linear(const SkinnyLinearArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. Throws if a launch
/// is refused.
void skinny_linear(const SkinnyLinearArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
