// select_tokens: the keys with the highest scores, exactly, in ascending order of position.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct SelectTokensArgs {
  const float* scores;       // [batch, kv_heads, capacity], last contiguous
  int64_t scores_stride[2];  // batch, head
  const int32_t* lengths;    // [batch], each in 0..capacity; null: all capacity
  int32_t* indices;          // [batch, kv_heads, width], contiguous; -1 after the last
  int32_t* counts;           // [batch, kv_heads], contiguous
  int64_t batch, kv_heads, capacity;
  int64_t budget;         // in 1..capacity
  int64_t width;          // min(budget, capacity)
  int64_t sinks, recent;  // each at most capacity; together at most the budget, or capacity
  double mass;            // in (0, 1]; 1: choose `budget` keys

  void* workspace;  // select_tokens_workspace_bytes(args) bytes, 16-byte aligned; CUDA only
  int64_t workspace_bytes;
};

namespace cpu {

/// Runs on the calling thread's OpenMP team. Returns -1, or the offset in elements, as if scores
/// were contiguous, of the first score that is NaN or, with mass below 1, negative or infinite
/// (-inf is none of them); then the outputs are undefined.
int64_t select_tokens(const SelectTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of workspace for these sizes on the current device.
int64_t select_tokens_workspace_bytes(const SelectTokensArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. A score that the CPU refuses makes the
/// count of its row and head -1, a length out of range all counts of its row; their indices are -1.
/// Throws if the workspace is too small or a launch is refused.
void select_tokens(const SelectTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
