// The CUDA entry points of tree_attention, compiled for the CPU and callable through ctypes.

#include <cstdint>

#include "guarded.h"
#include "tree_attention.h"

extern "C" {

int64_t tree_workspace_bytes(const adaptive::DecodeAttentionArgs* args) {
  return bytes_or_0([&] { return adaptive::cuda::tree_attention_workspace_bytes(*args); });
}

int tree_attention(const adaptive::DecodeAttentionArgs* args, char* error, int64_t error_bytes) {
  return guarded(error, [&] { adaptive::cuda::tree_attention(*args, nullptr); }, error_bytes);
}

}  // extern "C"
