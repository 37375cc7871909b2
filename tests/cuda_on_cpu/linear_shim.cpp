// The CUDA entry point of skinny_linear, compiled for the CPU and callable through ctypes.

#include <cstdint>

#include "guarded.h"
#include "simt/simt.h"
#include "skinny_linear.h"

extern "C" {

int64_t linear_args_bytes() { return sizeof(adaptive::SkinnyLinearArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int linear(const adaptive::SkinnyLinearArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::skinny_linear(*args, nullptr); });
}

}  // extern "C"
