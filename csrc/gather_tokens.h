// gather_tokens: the rows of listed tokens, one after another.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct GatherTokensArgs {
  const void* hidden;  // [batch, tokens, width], dtype, last contiguous
  DType dtype;         // float32, float16 or bfloat16
  int64_t batch, tokens, width, chosen;
  int64_t hidden_stride[2];  // batch, token
  const int32_t* list;       // [batch, chosen], last contiguous; each -1 or in 0..tokens-1
  int64_t list_stride;       // batch
  void* out;                 // [batch, chosen, width], contiguous; zeros where the list has -1

  int64_t element_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
};

namespace cpu {

void gather_tokens(const GatherTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. An entry out of
/// range makes its row of `out` NaN. Throws if a launch is refused.
void gather_tokens(const GatherTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
