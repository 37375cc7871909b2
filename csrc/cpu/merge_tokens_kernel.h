// What merge_tokens asks of the kernels of one instruction set. Included by every instruction set's
// file: nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "merge_tokens.h"

namespace adaptive::cpu {

/// Width of a unit vector in the scratch: padded with zeros, to whole vectors of any level.
constexpr int64_t padded_metric(int64_t width) { return (width + 31) / 32 * 32; }

/// The best target of each source of a row. All arrays are the caller's.
struct MergeMatch {
  int64_t row;
  int64_t sources;
  int64_t targets;
  float* units;     // [sources + targets + 3, padded_metric]: the last three hold anything finite
  float* best;      // [sources]: cosine
  int32_t* target;  // [sources]: its number among the targets
};

/// Some members of a row that become one token.
struct MergeGroup {
  int64_t row;
  const int32_t* members;  // ascending positions
  int64_t count;           // at least 1
  int64_t slot;
};

using MatchKernel = void (*)(const MergeTokensArgs&, const MergeMatch&);
using GroupKernel = void (*)(const MergeTokensArgs&, const MergeGroup&);

void match_sources_base(const MergeTokensArgs& args, const MergeMatch& match);
void match_sources_avx2(const MergeTokensArgs& args, const MergeMatch& match);
void match_sources_avx512(const MergeTokensArgs& args, const MergeMatch& match);

void average_group_base(const MergeTokensArgs& args, const MergeGroup& group);
void average_group_avx2(const MergeTokensArgs& args, const MergeGroup& group);
void average_group_avx512(const MergeTokensArgs& args, const MergeGroup& group);

}  // namespace adaptive::cpu
