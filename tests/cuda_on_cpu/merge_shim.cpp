// The CUDA entry points of merge_tokens, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "merge_tokens.h"
#include "simt/simt.h"

extern "C" {

int64_t args_bytes() { return sizeof(adaptive::MergeTokensArgs); }

int64_t workspace_bytes(const adaptive::MergeTokensArgs* args) {
  return adaptive::cuda::merge_tokens_workspace_bytes(*args);
}

void set_seed(unsigned seed) { simt::host::seed() = seed; }

/// Returns 0, or 1 and the message of the exception.
int merge_tokens(const adaptive::MergeTokensArgs* args, char* error) {
  try {
    adaptive::cuda::merge_tokens(*args, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 1000, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
