// The CUDA entry points of merge_tokens, compiled for the CPU and callable through ctypes.

#include <cstdint>

#include "guarded.h"
#include "merge_tokens.h"
#include "simt/simt.h"

extern "C" {

int64_t args_bytes() { return sizeof(adaptive::MergeTokensArgs); }

int64_t workspace_bytes(const adaptive::MergeTokensArgs* args) {
  return adaptive::cuda::merge_tokens_workspace_bytes(*args);
}

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int merge_tokens(const adaptive::MergeTokensArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::merge_tokens(*args, nullptr); });
}

}  // extern "C"
