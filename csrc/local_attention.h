// local_attention and block_sparse_attention: many query tokens attend to few keys each.
//
// Query i stands at position p = tokens - query_tokens + i. Row b of the batch is cut into
// sequences at offsets[b, 0] < offsets[b, 1] < ...; a query sees keys of its own sequence alone,
// and of them
//   causal:      k <= p and (p - k < window or k < first + sinks)
//   otherwise:   |p - k| < window or k < first + sinks
// where `first` is the sequence's first position. With lists of blocks it sees key k only if k /
// block_size is in the list of (row, head, i / block_size), too. Scores, out and lse are those of
// decode_attention. A query without any key gives zeros and lse = -inf; keys that no query sees are
// not read.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

/// The native contract. Strides count elements; the last axis of query, key, value and out is
/// contiguous. `group` is heads / kv_heads.
struct LocalAttentionArgs {
  const void* query;       // [batch, heads, query_tokens, head_dim], dtype
  const void* key;         // [batch, kv_heads, tokens, head_dim], dtype
  const void* value;       // [batch, kv_heads, tokens, head_dim], dtype
  const int32_t* windows;  // [heads], each at least 1; null: `window` for every head
  const int32_t*
      offsets;            // [batch, cuts], ascending in 0..tokens; null: one sequence of all tokens
  const int32_t* blocks;  // [batch, lists, query_blocks, chosen], last contiguous; ascending
  const int32_t* counts;  // [batch, lists, query_blocks], each in 0..chosen; null: no lists
  void* out;              // [batch, heads, query_tokens, head_dim], dtype
  float* lse;             // [batch, heads, query_tokens], contiguous

  DType dtype;  // float32, float16 or bfloat16
  bool causal;

  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t query_tokens;  // at most `tokens`
  int64_t tokens;        // at most 2^24
  int64_t head_dim;      // 32..256, a multiple of 8
  int64_t window;        // at least 1; `tokens` or more: no limit
  int64_t sinks;         // 0..tokens
  int64_t cuts;          // entries of a row of offsets, one more than sequences
  int64_t block_size;    // 16, 32, 64 or 128
  int64_t lists;         // kv_heads or heads
  int64_t chosen;

  int64_t query_stride[3];   // batch, head, token
  int64_t key_stride[3];     // batch, head, token
  int64_t value_stride[3];   // batch, head, token
  int64_t out_stride[3];     // batch, head, token
  int64_t offsets_stride;    // batch
  int64_t blocks_stride[3];  // batch, list, query block
  int64_t counts_stride[3];  // batch, list, query block

  float scale;
  float softcap;  // 0: off
};

namespace cpu {

/// Runs on the threads that torch.set_num_threads allows.
void local_attention(const LocalAttentionArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe. An offset, window, count or block out of
/// range, or ones that do not ascend, make the results that depend on them NaN. Throws if a launch
/// is refused.
void local_attention(const LocalAttentionArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
