// route_tokens: which tokens of each row a layer computes.
//
// Taken are the valid tokens whose score reaches the threshold; or the `room` highest of them, of
// equal scores the first, where room = min(n, capacity), or max(1, floor(share * n)) in float64, of
// n valid tokens. A NaN among them refuses the row.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct RouteTokensArgs {
  const float* scores;    // [batch, tokens], last contiguous
  const bool* valid;      // [batch, tokens], last contiguous; null: all are
  int64_t batch, tokens;  // tokens at most 2^30
  int64_t scores_stride;  // batch
  int64_t valid_stride;   // batch
  int64_t capacity;       // at least 1; 0: by share or by threshold
  double share;           // above 0, at most 1; 0: by capacity or by threshold
  float threshold;        // not NaN
  int32_t* list;          // [batch, tokens], contiguous: the routed positions, ascending, then -1
  int32_t* counts;        // [batch]; -1: refused
  int32_t* slots;         // [batch, tokens], contiguous: place in the list, or -1

  bool by_threshold() const { return capacity == 0 && share == 0; }
};

namespace cpu {

/// Returns the place in `scores`, counted as if it were contiguous, of the first NaN; -1: none.
int64_t route_tokens(const RouteTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. A row that is
/// refused has the count -1 and an empty list. Throws if a launch is refused.
void route_tokens(const RouteTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
