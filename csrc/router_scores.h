// router_scores: one score for each token, from its hidden state by a linear router.
//
// With x the hidden state, after an RMSNorm if there is one, and w the router's only row, the logit
// is w * x; with two rows, that of the last less that of the first, since the softmax of two is the
// sigmoid of their difference. Sums are float32 and nothing is rounded to the dtype.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct RouterScoresArgs {
  const void* hidden;       // [batch, tokens, width], dtype, last contiguous
  const void* weight;       // [routes, width], dtype, last contiguous
  const void* norm_weight;  // [width], dtype, contiguous; null: no norm
  DType dtype;              // float32, float16 or bfloat16
  int64_t batch, tokens;
  int64_t width;             // a multiple of 8, at least 8
  int64_t routes;            // 1 or 2
  int64_t hidden_stride[2];  // batch, token
  int64_t weight_stride;     // route
  float eps;                 // of the norm: x / sqrt(mean(x^2) + eps) * norm_weight
  bool sigmoid;              // of the logit; else the logit itself
  float* scores;             // [batch, tokens], contiguous
};

namespace cpu {

/// Each token's score depends on that token alone, and not on the number of threads, bit for bit.
void router_scores(const RouterScoresArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. Each token's score
/// depends on that token alone. Throws if a launch is refused.
void router_scores(const RouterScoresArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
