// gather_attention: a few query tokens attend to chosen keys of a KV cache, read in place.

#pragma once

#include <cstdint>

#include "common.h"
#include "decode_attention.h"

namespace adaptive {

struct GatherAttentionArgs {
  DecodeAttentionArgs attention;
  const int32_t* indices;         // [batch, kv_heads, chosen], last contiguous; ascending
  int64_t indices_stride[2];      // batch, head
  const int32_t* counts;          // [batch, kv_heads], each in 0..chosen
  int64_t counts_stride[2];       // batch, head
  int64_t chosen;                 // entries of a list at most
  int64_t page_size;              // tokens of an entry, a power of two in 1..64
  const void* extra_key;          // [batch, kv_heads, extra, head_dim], dtype, last contiguous
  const void* extra_value;        // as extra_key
  const float* extra_bias;        // [batch, kv_heads, extra]
  int64_t extra;                  // 0..64
  int64_t extra_key_stride[3];    // batch, head, token
  int64_t extra_value_stride[3];  // batch, head, token
  int64_t extra_bias_stride[3];   // batch, head, token
};

namespace cpu {

void gather_attention(const GatherAttentionArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of workspace that gather_attention wants for these sizes on the current device.
int64_t gather_attention_workspace_bytes(const GatherAttentionArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. A length, count or index out of range,
/// or indices that do not ascend, make the results of their row and KV head NaN. Throws if a launch
/// is refused.
void gather_attention(const GatherAttentionArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
