// The CUDA entry points of sparse_row_ffn, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "simt/simt.h"
#include "sparse_row_ffn.h"

extern "C" {

int64_t sparse_args_bytes() { return sizeof(adaptive::SparseRowFfnArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int64_t sparse_workspace_bytes(const adaptive::SparseRowFfnArgs* args) {
  return adaptive::cuda::sparse_row_ffn_workspace_bytes(*args);
}

/// Returns 0, or 1 and the message of the exception.
int sparse_ffn(const adaptive::SparseRowFfnArgs* args, void* workspace, int64_t bytes,
               char* error) {
  try {
    adaptive::cuda::sparse_row_ffn(*args, workspace, bytes, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, 1000, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
