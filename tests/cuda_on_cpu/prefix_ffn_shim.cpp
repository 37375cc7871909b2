// The CUDA entry points of prefix_row_ffn, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "prefix_row_ffn.h"
#include "simt/simt.h"

extern "C" {

int64_t prefix_args_bytes() { return sizeof(adaptive::PrefixRowFfnArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int64_t prefix_workspace_bytes(const adaptive::PrefixRowFfnArgs* args) {
  return adaptive::cuda::prefix_row_ffn_workspace_bytes(*args);
}

/// Returns 0, or 1 and the message of the exception.
int prefix_ffn(const adaptive::PrefixRowFfnArgs* args, void* workspace, int64_t bytes,
               char* error) {
  try {
    adaptive::cuda::prefix_row_ffn(*args, workspace, bytes, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 1000, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
