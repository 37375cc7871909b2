// The CUDA entry points of sparse_row_ffn, compiled for the CPU and callable through ctypes.

#include <cstdint>

#include "guarded.h"
#include "simt/simt.h"
#include "sparse_row_ffn.h"

extern "C" {

int64_t sparse_args_bytes() { return sizeof(adaptive::SparseRowFfnArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int64_t sparse_workspace_bytes(const adaptive::SparseRowFfnArgs* args) {
  return adaptive::cuda::sparse_row_ffn_workspace_bytes(*args);
}

int sparse_ffn(const adaptive::SparseRowFfnArgs* args, void* workspace, int64_t bytes,
               char* error) {
  return guarded(error, [&] { adaptive::cuda::sparse_row_ffn(*args, workspace, bytes, nullptr); });
}

}  // extern "C"
