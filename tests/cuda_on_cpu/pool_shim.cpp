// The CUDA entry point of pool_blocks, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "pool_blocks.h"
#include "simt/simt.h"

extern "C" {

int64_t pool_args_bytes() { return sizeof(adaptive::PoolBlocksArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

/// Returns 0, or 1 and the message of the exception.
int pool(const adaptive::PoolBlocksArgs* args, char* error) {
  try {
    adaptive::cuda::pool_blocks(*args, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 1000, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
