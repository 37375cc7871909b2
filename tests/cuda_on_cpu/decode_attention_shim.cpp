// The CUDA entry points of decode_attention, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <exception>

#include "decode_attention.h"
#include "simt/simt.h"

extern "C" {

int64_t args_bytes() { return sizeof(adaptive::DecodeAttentionArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

void set_device(int multiprocessors, int block_bytes, int multiprocessor_bytes) {
  simt::host::device() = {multiprocessors, block_bytes, multiprocessor_bytes};
}

int64_t workspace_bytes(const adaptive::DecodeAttentionArgs* args) {
  return adaptive::cuda::decode_attention_workspace_bytes(*args);
}

/// Returns 0, or 1 and the message of the exception.
int decode_attention(const adaptive::DecodeAttentionArgs* args, char* error, int64_t error_bytes) {
  try {
    adaptive::cuda::decode_attention(*args, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
