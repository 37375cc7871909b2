// merge_tokens: the tokens that are most alike become one, by bipartite matching.
//
// Of the real tokens of a row from `protect` on, those at even positions may each merge into the
// token at an odd position whose metric has the highest cosine with theirs; the pairs with the
// highest cosines do. Of equal cosines the lowest position is first, both times; NaN counts as -2,
// below every cosine. A merged token is the mean of its members weighted by their sizes, one that
// stands alone keeps its bits, and all keep their order. Padding stays behind them.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct MergeTokensArgs {
  const void* hidden;      // [batch, tokens, width], dtype, last contiguous
  const void* metric;      // [batch, tokens, metric_width], dtype, last contiguous
  const float* sizes;      // [batch, tokens], contiguous: of each token; null: all 1
  const int32_t* lengths;  // [batch], contiguous: the first so many are real; null: all
  const int32_t* counts;   // [batch], contiguous: pairs that merge in each row; null: `removed`
  void* out;               // [batch, kept(), width], dtype, contiguous; zeros for padding
  float* out_sizes;        // [batch, kept()], contiguous; 0 for padding
  int64_t* groups;         // [batch, tokens], contiguous: where each token went; -1: padding

  DType dtype;  // float32, float16 or bfloat16

  int64_t batch;
  int64_t tokens;        // at most 2^31 - 1
  int64_t width;         // a multiple of 8
  int64_t metric_width;  // a multiple of 8, at least 8
  int64_t removed;       // 0..possible(tokens): how many tokens fewer a row has
  int64_t protect;       // tokens at the start of a row that never merge

  int64_t hidden_stride[2];  // batch, token
  int64_t metric_stride[2];  // batch, token

  void* workspace;  // merge_tokens_workspace_bytes(args) bytes, 8-byte aligned; CUDA only
  int64_t workspace_bytes;

  int64_t kept() const { return tokens - removed; }

  /// The position of the first token that may merge into another.
  int64_t first_source() const { return protect + protect % 2; }
  /// The position of the first token that others may merge into.
  int64_t first_target() const { return protect + 1 - protect % 2; }
  /// Tokens of either kind among the first `length`.
  int64_t sources(int64_t length) const {
    return length > first_source() ? (length - first_source() + 1) / 2 : 0;
  }
  int64_t targets(int64_t length) const {
    return length > first_target() ? (length - first_target() + 1) / 2 : 0;
  }
  /// Pairs that may merge in a row of `length` real tokens.
  int64_t possible(int64_t length) const { return targets(length) > 0 ? sources(length) : 0; }
  /// Pairs that do: as asked for, but at least so many that the row fits into kept() tokens. That
  /// many can: length - possible(length) never falls as rows grow.
  int64_t pairs(int64_t row, int64_t length) const {
    int64_t wanted = counts != nullptr ? counts[row] : removed;
    if (wanted < length - kept()) wanted = length - kept();
    if (wanted < 0) wanted = 0;
    const int64_t most = possible(length);
    return wanted < most ? wanted : most;
  }
};

namespace cpu {

/// Runs on the threads that torch.set_num_threads allows. Each row's results depend on that row
/// alone, and not on the number of threads, bit for bit.
void merge_tokens(const MergeTokensArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of workspace for these sizes.
int64_t merge_tokens_workspace_bytes(const MergeTokensArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. A row's results depend on that row
/// alone. A length out of range counts as the nearest in 0..tokens. Throws if the workspace is too
/// small or a launch is refused.
void merge_tokens(const MergeTokensArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
