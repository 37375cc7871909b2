// What prefix_row_ffn.cpp asks of one instruction set. Included by every instruction set's file:
// nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "prefix_row_ffn.h"

namespace adaptive::cpu {

/// Neurons that are activated together, and whose values lie in cache until then.
constexpr int kPrefixNeurons = 64;

/// A call's rows that use any neuron, from the widest on: row r here is order[r] of the arguments.
struct PrefixRows {
  int64_t count = 0;
  int64_t padded = 0;  // linear_rows(count)
  int64_t order[kMaxPrefixRows] = {};
  int64_t widths[kMaxPrefixRows + 4] = {};  // with zeros for what the last tile lacks
  const float* input = nullptr;             // what linear_input made of them
  int64_t input_width = 0;
  float* hidden = nullptr;   // [padded, hidden_width], in the kernel's own order
  int64_t hidden_width = 0;  // the widest, rounded up to kPrefixNeurons
};

struct PrefixKernel {
  /// Computes `hidden` at kPrefixNeurons neurons from `begin` on, a multiple of that: 0 where a row
  /// does not use the neuron.
  void (*activate)(const PrefixRowFfnArgs& args, const PrefixRows& rows, int64_t begin);
  /// Computes output features [begin, end) of the rows from `hidden`.
  void (*project)(const PrefixRowFfnArgs& args, const PrefixRows& rows, int64_t begin, int64_t end);
};

extern const PrefixKernel kPrefixBase, kPrefixAvx2, kPrefixAvx512, kPrefixAvx512Bf16;

}  // namespace adaptive::cpu
