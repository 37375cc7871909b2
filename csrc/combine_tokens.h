// combine_tokens: adds weighted rows to the hidden states of listed tokens.
//
// out[b, list[b, i]] = hidden[b, list[b, i]] + weights[b, i] * update[b, i], in float32, rounded
// once; the rows of other tokens are those of hidden.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct CombineTokensArgs {
  const void* hidden;    // [batch, tokens, width], dtype, last contiguous
  void* out;             // the same shape; hidden itself, or memory that hidden has no part in
  const void* update;    // [batch, chosen, width], dtype, last contiguous
  const int32_t* list;   // [batch, chosen], last contiguous; each -1, or distinct in 0..tokens-1
  const float* weights;  // [batch, chosen], last contiguous; null: all are 1
  DType dtype;           // float32, float16 or bfloat16
  int64_t batch, tokens, width, chosen;
  int64_t hidden_stride[2];  // batch, token
  int64_t out_stride[2];     // batch, token
  int64_t update_stride[2];  // batch, entry
  int64_t list_stride;       // batch
  int64_t weights_stride;    // batch

  bool in_place() const { return out == hidden; }
  int64_t element_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
};

namespace cpu {

void combine_tokens(const CombineTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. An entry out of
/// range is passed over; of equal entries of a row at least one counts. Throws if a launch is
/// refused.
void combine_tokens(const CombineTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
