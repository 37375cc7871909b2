// decode_attention: a few query tokens attend to a long, strided KV cache.
//
//   score[b,h,t,s] = softcap(scale * <query[b,h,t], key[b,h/group,s]>) + mask[b,h,t,s]
//   out[b,h,t]     = sum_s softmax_s(score[b,h,t,:]) * value[b,h/group,s]
//   lse[b,h,t]     = log sum_s exp(score[b,h,t,s])
//
// with softcap(x) = c * tanh(x / c) for c > 0 and x otherwise. Key s takes part if s < length[b],
// if causality admits it (s <= length[b] - query_tokens + t) and if the mask does not exclude it.
// In a token tree (parents is given; tree_attention.h) ancestry takes the place of causality.
// A query without any key gives zeros and lse = -inf. Keys that no query of a row may see are never
// read, so whatever lies in unused slots (NaN too) has no effect. With cache_rows, row b of the
// query reads row cache_rows[b] of key and value; lengths and mask go with the query.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

/// The native contract, the same for every device. Strides count elements; the last axis of query,
/// key, value and out is contiguous. `group` is heads / kv_heads.
struct DecodeAttentionArgs {
  const void* query;       // [batch, heads, query_tokens, head_dim], dtype
  const void* key;         // [cache_batch, kv_heads, capacity, head_dim], dtype
  const void* value;       // [cache_batch, kv_heads, capacity, head_dim], dtype
  const int32_t* lengths;  // [batch], each in 0..capacity; null: all rows are `capacity` long
  const void* mask;        // [batch, heads, query_tokens, capacity], stride 0 broadcasts; or null
  const int64_t* parents;  // [batch, query_tokens], contiguous, each in -1..i-1; null: no tree
  const int64_t* cache_rows;  // [batch], contiguous, each in 0..cache_batch-1; null: row b is b
  float* out;                 // [batch, heads, query_tokens, head_dim]
  float* lse;                 // [batch, heads, query_tokens], contiguous
  void* workspace;            // CUDA: partial results of the splits; CPU: null
  int64_t workspace_bytes;

  DType dtype;    // of query, key and value: float32, float16 or bfloat16
  bool mask_add;  // mask is float32 and is added; otherwise it is bool, and true takes part
  bool causal;

  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t query_tokens;  // 1..16
  int64_t capacity;
  int64_t head_dim;     // 32..256, a multiple of 8
  int64_t cache_batch;  // batch, unless cache_rows is given

  int64_t query_stride[3];  // batch, head, token
  int64_t key_stride[3];    // batch, head, token
  int64_t value_stride[3];  // batch, head, token
  int64_t out_stride[3];    // batch, head, token
  int64_t mask_stride[4];   // batch, head, query token, key

  float scale;
  float softcap;  // 0: off
};

namespace cpu {

/// Runs on the threads that torch.set_num_threads allows; splits the keys when heads are few.
void decode_attention(const DecodeAttentionArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of workspace that decode_attention wants for these sizes on the current device.
int64_t decode_attention_workspace_bytes(const DecodeAttentionArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. A length outside 0..capacity makes its
/// row NaN. Throws if a launch is refused.
void decode_attention(const DecodeAttentionArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
