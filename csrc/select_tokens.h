// select_tokens: the keys with the highest scores of each row and KV head.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

/// A score that is NaN, or with mass < 1 negative or infinite, makes the count of its row and head
/// -1; so does, on CUDA, a length out of range.
struct SelectTokensArgs {
  const float* scores;       // [batch, kv_heads, capacity], last contiguous
  int64_t scores_stride[2];  // batch, head
  const int32_t* lengths;    // [batch], each in 0..capacity; null: all rows are `capacity` long
  int32_t* indices;          // [batch, kv_heads, width], contiguous
  int32_t* counts;           // [batch, kv_heads], contiguous
  int64_t batch, kv_heads, capacity;
  int64_t budget;  // at least 1 and at least sinks + recent
  int64_t width;   // min(budget, capacity)
  int64_t sinks, recent;
  double mass;      // 1: choose `budget` keys
  void* workspace;  // CUDA: state of the search; CPU: null
  int64_t workspace_bytes;
};

namespace cpu {

void select_tokens(const SelectTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of workspace that select_tokens wants for these sizes on the current device.
int64_t select_tokens_workspace_bytes(const SelectTokensArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. Throws if a launch is refused.
void select_tokens(const SelectTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
