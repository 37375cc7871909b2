// What the schedule (decode_attention.cpp) asks of the kernel of one instruction set. Included by
// every instruction set's file: nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "decode_attention.h"

namespace adaptive::cpu {

constexpr int kBlockKeys = 64;  // scored, weighed and accumulated at a time; a mask is 64 bits
constexpr int kTileRows = 4;    // query rows that share each load of a key or value
constexpr int kWidthStep = 32;  // two of the widest vectors: no kernel's rows are padded further

/// Thread-private buffers. A query row is a (head of the group, query token), in that order. `rows`
/// is their number rounded up to kTileRows, `width` head_dim rounded up to kWidthStep.
struct DecodeScratch {
  float* query;    // [rows, width]
  float* acc;      // [rows, width]
  float* scores;   // [rows, kBlockKeys]
  uint64_t* seen;  // [rows]
};

/// One piece of work: every query row of a (batch row, KV head) against keys [begin, end).
struct DecodeItem {
  int64_t batch;
  int64_t kv_head;
  int64_t begin;  // a multiple of kBlockKeys
  int64_t end;
  // Results per query row: sum of exp(score - max) * value, max of the scores, sum of exp(...).
  // Without any key: 0, -inf, 0.
  float* acc;  // [group * query_tokens, head_dim]
  float* max;  // [group * query_tokens]
  float* sum;  // [group * query_tokens]
};

using DecodeKernel = void (*)(const DecodeAttentionArgs&, const DecodeItem&, const DecodeScratch&);

void decode_item_base(const DecodeAttentionArgs& args, const DecodeItem& item,
                      const DecodeScratch& scratch);
void decode_item_avx2(const DecodeAttentionArgs& args, const DecodeItem& item,
                      const DecodeScratch& scratch);
void decode_item_avx512(const DecodeAttentionArgs& args, const DecodeItem& item,
                        const DecodeScratch& scratch);

}  // namespace adaptive::cpu
