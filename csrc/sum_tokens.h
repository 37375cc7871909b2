// sum_tokens: the sum of chosen keys or values of a KV cache, read in place.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct SumTokensArgs {
  const void* source;  // [batch, kv_heads, capacity, head_dim], dtype, last contiguous
  DType dtype;         // float32, float16 or bfloat16
  int64_t batch, kv_heads, capacity, head_dim;
  int64_t source_stride[3];   // batch, head, token
  const int32_t* indices;     // [batch, kv_heads, chosen], last contiguous; ascending
  int64_t indices_stride[2];  // batch, head
  const int32_t* counts;      // [batch, kv_heads], each in 0..chosen
  int64_t counts_stride[2];   // batch, head
  int64_t chosen;
  float* sums;  // [batch, kv_heads, head_dim], contiguous
};

namespace cpu {

void sum_tokens(const SumTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. A count or index out
/// of range, or indices that do not ascend, make the sums of their row and KV head NaN. Throws if a
/// launch is refused.
void sum_tokens(const SumTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
