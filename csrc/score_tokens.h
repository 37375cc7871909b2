// score_tokens and scored_attention: the weight of every key of a KV cache, for each KV head, with
// or without the attention itself.

#pragma once

#include <cstdint>

#include "common.h"
#include "decode_attention.h"

namespace adaptive {

/// What becomes of the rows of a KV head: sum or maximum of their softmax weights, or the maximum
/// of their scores before the softmax.
enum class Reduce : int32_t { kSum, kMax, kLogit };

struct ScoreTokensArgs {
  DecodeAttentionArgs attention;  // value and out null for score_tokens
  float* scores;                  // [batch, kv_heads, capacity], contiguous
  Reduce reduce;
  void* workspace;  // CUDA: scores of each row and partial results; CPU: null
  int64_t workspace_bytes;
};

namespace cpu {

void score_tokens(const ScoreTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of workspace that score_tokens wants for these sizes on the current device.
int64_t score_tokens_workspace_bytes(const ScoreTokensArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. A length outside 0..capacity makes its
/// row NaN. Throws if a launch is refused.
void score_tokens(const ScoreTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
