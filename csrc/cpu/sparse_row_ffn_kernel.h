// What sparse_row_ffn.cpp asks of one instruction set. Included by every instruction set's file:
// nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "sparse_row_ffn.h"

namespace adaptive::cpu {

constexpr int kMaxSparseRows = 16;
constexpr int64_t kSparseWidth = 32;  // two of the widest vectors: no kernel pads rows further

/// One part of the neurons, for all rows.
struct SparseItem {
  const float* input;  // [rows, in_width], as widen made them
  int64_t in_width;    // in_features, rounded up to kSparseWidth
  int64_t out_width;   // out_features, likewise
  int64_t begin, end;  // neurons, at most kSparsePart
  float* sums;         // [rows, out_width]: overwritten, in the kernel's own order
};

struct SparseKernel {
  /// Writes input row `row` as float, in the kernel's own order and padded with zeros.
  void (*widen)(const SparseRowFfnArgs& args, int64_t row, float* to);
  /// Computes what the item's neurons add to each row.
  void (*run)(const SparseRowFfnArgs& args, const SparseItem& item);
  /// Rounds `sums`, [out_width], to row `row` of the output.
  void (*narrow)(const SparseRowFfnArgs& args, int64_t row, const float* sums);
};

extern const SparseKernel kSparseBase, kSparseAvx2, kSparseAvx512;

}  // namespace adaptive::cpu
