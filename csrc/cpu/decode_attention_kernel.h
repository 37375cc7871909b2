// What the schedule (decode_schedule.h) asks of the kernel of one instruction set. Included by
// every instruction set's file: nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "decode_attention.h"
#include "gather_attention.h"
#include "score_tokens.h"
#include "sum_tokens.h"

namespace adaptive::cpu {

constexpr int kBlockKeys = 64;  // scored, weighed and accumulated at a time; a mask is 64 bits
constexpr int kMostNodes = 16;  // of a token tree
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

/// Where an item leaves what score_tokens needs: for each key of a block exp(score - maximum so
/// far), or the score itself; -1 and -inf for keys that no query row sees.
struct WeightSink {
  float* weights;  // [query row, key]; null: not wanted
  int64_t stride;  // of a query row, a multiple of kBlockKeys
  float* maxima;   // [query row, block of keys]: what its weights are relative to
  bool logits;     // the scores themselves
};

/// One piece of work: every query row of a (batch row, KV head) against keys [begin, end). With a
/// list, keys are numbered by their place in it, and the extra tokens follow as one more block.
struct DecodeItem {
  int64_t batch;
  int64_t kv_head;
  int64_t begin;  // a multiple of kBlockKeys
  int64_t end;
  const GatherAttentionArgs* list;  // null: the keys of the cache in their order
  WeightSink sink;
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
void decode_item_avx512bf16(const DecodeAttentionArgs& args, const DecodeItem& item,
                            const DecodeScratch& scratch);

/// Keys that a list names for a (batch row, KV head); those beyond the row's length count.
static inline int64_t listed_keys(const GatherAttentionArgs& list, int64_t batch, int64_t kv_head) {
  return list.page_size *
         list.counts[batch * list.counts_stride[0] + kv_head * list.counts_stride[1]];
}

/// The weights of keys [begin, end) of a (batch row, KV head), and what becomes of them.
struct ReduceItem {
  WeightSink sink;
  int64_t rows;
  const float* lse;  // of each query row
  float* scores;     // of each key
  int64_t begin;     // a multiple of kBlockKeys
  int64_t end;
  Reduce reduce;
};

using ReduceKernel = void (*)(const ReduceItem&);

void reduce_item_base(const ReduceItem& item);
void reduce_item_avx2(const ReduceItem& item);
void reduce_item_avx512(const ReduceItem& item);

/// Tokens [begin, end) of the list of a (batch row, KV head), and where their sum goes.
struct SumItem {
  int64_t batch;
  int64_t kv_head;
  int64_t begin;
  int64_t end;
  float* sums;  // [head_dim]
};

using SumKernel = void (*)(const SumTokensArgs&, const SumItem&);

void sum_item_base(const SumTokensArgs& args, const SumItem& item);
void sum_item_avx2(const SumTokensArgs& args, const SumItem& item);
void sum_item_avx512(const SumTokensArgs& args, const SumItem& item);

}  // namespace adaptive::cpu
