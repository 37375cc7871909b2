// The CUDA entry points of decode_attention, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "decode_attention.h"
#include "simt/simt.h"

extern "C" {

int64_t args_bytes() { return sizeof(adaptive::DecodeAttentionArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

void set_device(int multiprocessors, int block_bytes, int multiprocessor_bytes) {
  simt::host::device() = {multiprocessors, block_bytes, multiprocessor_bytes};
}

/// 0 where the sizes are refused: decode_attention then says why.
int64_t workspace_bytes(const adaptive::DecodeAttentionArgs* args) {
  try {
    return adaptive::cuda::decode_attention_workspace_bytes(*args);
  } catch (const std::invalid_argument&) {
    return 0;
  }
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
