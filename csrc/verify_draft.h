// verify_draft: which drafted tokens are what the target model would have said itself.
//
// Node i of a row was drafted to follow node parents[i], or the context if that is -1; in a list,
// node i follows node i - 1. choices[0] is the target's token after the context, choices[1 + i] its
// token after node i. From the context on, the walk goes to the first node that follows where it
// stands and has the token chosen there, until there is none.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct VerifyDraftArgs {
  const int64_t* drafted;  // [batch, nodes], last contiguous
  const int64_t* choices;  // [batch, nodes + 1], last contiguous
  const int64_t* parents;  // [batch, nodes], contiguous; parents[i] in -1..i-1; null: lists
  const int64_t* lengths;  // [batch], contiguous, each in 0..nodes; null: all nodes are real
  int64_t* accepted;       // [batch]: how many nodes the walk visits
  int64_t* path;           // [batch, nodes + 1], contiguous: which, then -1
  int64_t* tokens;  // [batch, nodes + 1], contiguous: their tokens, the choice at the end, -1

  int64_t batch;
  int64_t nodes;

  int64_t drafted_stride;  // batch
  int64_t choices_stride;  // batch
};

namespace cpu {

/// Runs on the calling thread: there is next to nothing to do.
void verify_draft(const VerifyDraftArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. A parent out of
/// range counts as -1. A length out of range makes all results of its row -1. Throws if a launch is
/// refused.
void verify_draft(const VerifyDraftArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
