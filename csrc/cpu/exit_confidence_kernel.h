// What exit_confidence.cpp asks of one instruction set. Included by every instruction set's file:
// nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "exit_confidence.h"

namespace adaptive::cpu {

/// Vocabulary is cut at multiples of it whatever the number of threads, and its pieces are merged
/// in order. A multiple of every vector's width and of the features taken at a time.
constexpr int kSliceTokens = 128;

/// The two highest logits of some tokens. NaN is the highest of all; of equals the first is.
struct TopLogits {
  float top[2];
  int64_t tokens[2];  // -1: none
};

/// What a slice of the vocabulary says of one row. Sums are relative to top[0]; if that is not
/// finite they are undefined.
struct ExitSlice {
  TopLogits best;
  float sum;       // of exp(x)
  float weighted;  // of x * exp(x)
};

namespace {

/// Tokens are offered in ascending order, except that those of a slice may come highest first.
ADAPTIVE_INLINE void offer(TopLogits& best, float logit, int64_t token) {
  const bool is_nan = logit != logit;
  const auto beats = [&](int place) {
    const float held = best.top[place];
    return best.tokens[place] < 0 || logit > held || (is_nan && held == held);
  };
  if (beats(0)) {
    best = {{logit, best.top[0]}, {token, best.tokens[0]}};
  } else if (beats(1)) {
    best.top[1] = logit;
    best.tokens[1] = token;
  }
}

constexpr TopLogits kNoLogits = {{-kInfinity, -kInfinity}, {-1, -1}};

}  // namespace

/// Summarises slices [begin, end) into to[slice * rows + row]. `input` is what linear_input made,
/// `width` floats to a row.
using ExitKernel = void (*)(const ExitConfidenceArgs& args, const float* input, int64_t width,
                            int64_t begin, int64_t end, ExitSlice* to);

void summarise_slices_base(const ExitConfidenceArgs& args, const float* input, int64_t width,
                           int64_t begin, int64_t end, ExitSlice* to);
void summarise_slices_avx2(const ExitConfidenceArgs& args, const float* input, int64_t width,
                           int64_t begin, int64_t end, ExitSlice* to);
void summarise_slices_avx512(const ExitConfidenceArgs& args, const float* input, int64_t width,
                             int64_t begin, int64_t end, ExitSlice* to);
void summarise_slices_avx512bf16(const ExitConfidenceArgs& args, const float* input, int64_t width,
                                 int64_t begin, int64_t end, ExitSlice* to);

}  // namespace adaptive::cpu
