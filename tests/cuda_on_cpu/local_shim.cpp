// The CUDA entry point of local_attention, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "local_attention.h"
#include "simt/simt.h"

extern "C" {

int64_t local_args_bytes() { return sizeof(adaptive::LocalAttentionArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

void set_device(int multiprocessors, int block_bytes, int multiprocessor_bytes) {
  simt::host::device() = {multiprocessors, block_bytes, multiprocessor_bytes};
}

/// Returns 0, or 1 and the message of the exception.
int local_attention(const adaptive::LocalAttentionArgs* args, char* error) {
  try {
    adaptive::cuda::local_attention(*args, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 1000, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
