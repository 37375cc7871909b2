// The CUDA entry points of tree_attention, compiled for the CPU and callable through ctypes.

#include <cstdint>
#include <cstdio>
#include <stdexcept>

#include "tree_attention.h"

extern "C" {

int64_t tree_workspace_bytes(const adaptive::DecodeAttentionArgs* args) {
  try {
    return adaptive::cuda::tree_attention_workspace_bytes(*args);
  } catch (const std::invalid_argument&) {
    return 0;
  }
}

/// Returns 0, or 1 and the message of the exception.
int tree_attention(const adaptive::DecodeAttentionArgs* args, char* error, int64_t error_bytes) {
  try {
    adaptive::cuda::tree_attention(*args, nullptr);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
