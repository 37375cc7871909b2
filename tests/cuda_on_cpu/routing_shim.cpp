// The CUDA entry points of the ops that route tokens, compiled for the CPU and callable by ctypes.

#include <cstdint>

#include "combine_tokens.h"
#include "gather_tokens.h"
#include "guarded.h"
#include "route_tokens.h"
#include "router_scores.h"
#include "simt/simt.h"

extern "C" {

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int64_t combine_tokens_args_bytes() { return sizeof(adaptive::CombineTokensArgs); }
int64_t gather_tokens_args_bytes() { return sizeof(adaptive::GatherTokensArgs); }
int64_t route_tokens_args_bytes() { return sizeof(adaptive::RouteTokensArgs); }
int64_t router_scores_args_bytes() { return sizeof(adaptive::RouterScoresArgs); }

int combine_tokens(const adaptive::CombineTokensArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::combine_tokens(*args, nullptr); });
}

int gather_tokens(const adaptive::GatherTokensArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::gather_tokens(*args, nullptr); });
}

int route_tokens(const adaptive::RouteTokensArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::route_tokens(*args, nullptr); });
}

int router_scores(const adaptive::RouterScoresArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::router_scores(*args, nullptr); });
}

}  // extern "C"
