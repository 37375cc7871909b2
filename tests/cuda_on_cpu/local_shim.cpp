// The CUDA entry points of local_attention and pool_blocks, compiled for the CPU and callable
// through ctypes.

#include <cstdint>

#include "guarded.h"
#include "local_attention.h"
#include "pool_blocks.h"
#include "simt/simt.h"

extern "C" {

int64_t local_args_bytes() { return sizeof(adaptive::LocalAttentionArgs); }
int64_t pool_args_bytes() { return sizeof(adaptive::PoolBlocksArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

void set_device(int multiprocessors, int block_bytes, int multiprocessor_bytes) {
  simt::host::device() = {multiprocessors, block_bytes, multiprocessor_bytes};
}

int local_attention(const adaptive::LocalAttentionArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::local_attention(*args, nullptr); });
}

int pool_blocks(const adaptive::PoolBlocksArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::pool_blocks(*args, nullptr); });
}

}  // extern "C"
