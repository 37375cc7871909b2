// What local_attention's schedule asks of the kernel of one instruction set. Included by every
// instruction set's file: nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "local_attention.h"

namespace adaptive::cpu {

constexpr int kTileKeys = 64;       // scored at a time; which of them a query sees is 64 bits
constexpr int kMaxColumns = 256;    // queries of an item: tokens times heads
constexpr int kColumnStep = 32;     // two of the widest vectors: no kernel pads columns further
constexpr int kTileWidthStep = 32;  // likewise for elements of a head

/// Keys that one query sees: two intervals of positions, the second within the same sequence.
struct KeySpan {
  int32_t near_begin, near_end;
  int32_t sink_begin, sink_end;
};

/// One piece of work: some query tokens of some heads that share a KV head. A column is a (head,
/// token), in that order.
struct LocalItem {
  int64_t batch;
  int64_t head;  // the first
  int64_t heads;
  int64_t token;  // the first
  int64_t tokens;
};

/// Thread-private buffers. `columns` is their number rounded up to kColumnStep, `width` head_dim
/// rounded up to kTileWidthStep. Panels are as many columns as the kernel takes at a time.
struct LocalScratch {
  float* query;    // [panel][width][columns of a panel]
  float* acc;      // the same
  float* scores;   // [kTileKeys][kColumnStep]
  float* key;      // [kTileKeys][width]
  float* value;    // the same
  float* row;      // [width]
  float* max;      // [columns]; a result, of the scores; -inf without any key
  float* sum;      // [columns]; a result, of exp(score - max)
  KeySpan* spans;  // [columns]
};

using LocalKernel = void (*)(const LocalAttentionArgs&, const LocalItem&, const LocalScratch&);

void local_item_base(const LocalAttentionArgs& args, const LocalItem& item,
                     const LocalScratch& scratch);
void local_item_avx2(const LocalAttentionArgs& args, const LocalItem& item,
                     const LocalScratch& scratch);
void local_item_avx512(const LocalAttentionArgs& args, const LocalItem& item,
                       const LocalScratch& scratch);

}  // namespace adaptive::cpu
