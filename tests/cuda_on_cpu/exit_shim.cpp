// The CUDA entry points of exit_confidence, compiled for the CPU and callable through ctypes.

#include <cstdint>

#include "exit_confidence.h"
#include "guarded.h"
#include "simt/simt.h"

extern "C" {

int64_t exit_args_bytes() { return sizeof(adaptive::ExitConfidenceArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int64_t exit_workspace_bytes(const adaptive::ExitConfidenceArgs* args) {
  return adaptive::cuda::exit_confidence_workspace_bytes(*args);
}

int exit_confidence(const adaptive::ExitConfidenceArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::exit_confidence(*args, nullptr); });
}

}  // extern "C"
