// verify_samples: speculative sampling of a drafted list (Leviathan et al. 2023, arXiv:2211.17192).
//
// With p the target's and q the drafter's probabilities of a node, its token x is accepted if
// u * q[x] < p[x]: with probability min(1, p[x] / q[x]). At the first node that is not, the next
// token is drawn in proportion to max(p - q, 0); if all are, in proportion to the p after the last.
// A draw takes the first token whose cumulative weight exceeds u' times the sum of weights and
// whose own is positive; the last positive one if rounding leaves none. Should all of max(p - q, 0)
// be 0, p takes its place.
//
// Products and differences are float64: exact, but for probabilities 2^53 apart. So are sums, which
// are exact if probabilities are multiples of 2^-30; otherwise their rounding, of some 2^-50, may
// decide between two neighbouring tokens.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct VerifySamplesArgs {
  const int64_t* drafted;     // [batch, nodes], last contiguous, each in 0..vocab-1
  const float* draft_probs;   // [batch, nodes, vocab], last contiguous, finite and not negative
  const float* target_probs;  // [batch, nodes + 1, vocab], the same
  const float* uniforms;      // [batch, nodes + 1], last contiguous, each in 0..1; last: u'
  const int64_t* lengths;     // [batch], contiguous, each in 0..nodes; null: all nodes are real
  int64_t* accepted;          // [batch]: how many; -1: refused, for a probability
  int64_t* tokens;            // [batch, nodes + 1], contiguous: accepted ones, the drawn one, -1

  int64_t batch;
  int64_t nodes;
  int64_t vocab;  // at least 1

  int64_t drafted_stride;    // batch
  int64_t draft_stride[2];   // batch, node
  int64_t target_stride[2];  // batch, node
  int64_t uniforms_stride;   // batch
};

namespace cpu {

/// Runs on the threads that torch.set_num_threads allows. A row is refused if a probability that is
/// looked at is negative or not finite, or if all of p are 0: looked at are those of the drafted
/// tokens, and those that the last token is drawn from.
void verify_samples(const VerifySamplesArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. A row is refused for
/// a token, uniform or length out of range, too, and its tokens are -1. Throws if a launch is
/// refused.
void verify_samples(const VerifySamplesArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
