// The CUDA entry points of decode_attention, compiled for the CPU and callable through ctypes.

#include <cstdint>

#include "decode_attention.h"
#include "guarded.h"
#include "simt/simt.h"

extern "C" {

int64_t args_bytes() { return sizeof(adaptive::DecodeAttentionArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

void set_device(int multiprocessors, int block_bytes, int multiprocessor_bytes) {
  simt::host::device() = {multiprocessors, block_bytes, multiprocessor_bytes};
}

int64_t workspace_bytes(const adaptive::DecodeAttentionArgs* args) {
  return bytes_or_0([&] { return adaptive::cuda::decode_attention_workspace_bytes(*args); });
}

int decode_attention(const adaptive::DecodeAttentionArgs* args, char* error, int64_t error_bytes) {
  return guarded(error, [&] { adaptive::cuda::decode_attention(*args, nullptr); }, error_bytes);
}

}  // extern "C"
