// The CUDA entry point of skinny_linear, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "simt/simt.h"
#include "skinny_linear.h"

extern "C" {

int64_t linear_args_bytes() { return sizeof(adaptive::SkinnyLinearArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

/// Returns 0, or 1 and the message of the exception.
int linear(const adaptive::SkinnyLinearArgs* args, char* error) {
  try {
    adaptive::cuda::skinny_linear(*args, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 1000, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
