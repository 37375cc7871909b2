// The CUDA entry points of exit_confidence, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "exit_confidence.h"
#include "simt/simt.h"

extern "C" {

int64_t exit_args_bytes() { return sizeof(adaptive::ExitConfidenceArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int64_t exit_workspace_bytes(const adaptive::ExitConfidenceArgs* args) {
  return adaptive::cuda::exit_confidence_workspace_bytes(*args);
}

/// Returns 0, or 1 and the message of the exception.
int exit_confidence(const adaptive::ExitConfidenceArgs* args, char* error) {
  try {
    adaptive::cuda::exit_confidence(*args, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 1000, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
