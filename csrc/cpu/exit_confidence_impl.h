// The kernel of exit_confidence, a template on a SIMD trait. The logits of one slice go to a buffer
// that stays in cache; what a slice says is taken from there, so that the loop over the weight is
// skinny_linear's own.

#pragma once

#include "cpu/exit_confidence_kernel.h"
#include "cpu/linear_features.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

constexpr int kExitRows = 16;  // the most rows of a call

/// Scales and caps `count` logits; behind them come logits that count nothing.
template <class S>
void finish_logits(const ExitConfidenceArgs& args, int count, float* logits) {
  const auto scale = S::set1(args.scale), cap = S::set1(args.softcap);
  for (int i = 0; i < count; i += S::kWidth) {
    auto x = S::mul(S::load(logits + i), scale);
    if (args.softcap > 0) x = S::mul(cap, tanh<S>(S::div(x, cap)));
    S::store(logits + i, x);
  }
  for (int i = count; i < kSliceTokens; ++i) logits[i] = -kInfinity;
}

template <class S>
ExitSlice summarise(const float* logits, int64_t first, int count) {
  ExitSlice made{kNoLogits, 0, 0};
  const int head = count < S::kWidth ? count : S::kWidth;
  for (int i = 0; i < head; ++i) offer(made.best, logits[i], first + i);
  float values[S::kWidth];
  int32_t positions[S::kWidth];
  for (int i = S::kWidth; i < count; i += S::kWidth) {
    const auto limit = S::set1(made.best.top[1]);
    const int found = S::append_not_less(S::load(logits + i), limit, i, values, positions);
    // Those behind the last token are -inf, which beats nothing that is held by now.
    for (int j = 0; j < found; ++j) offer(made.best, values[j], first + positions[j]);
  }
  const auto shift = S::set1(made.best.top[0]);
  const auto lowest = S::set1(-100.0f);  // exp of less is 0, and 0 * -inf would be NaN
  auto sum = S::zero(), weighted = S::zero();
  for (int i = 0; i < kSliceTokens; i += S::kWidth) {
    const auto x = S::sub(S::load(logits + i), shift);
    const auto weight = exp<S>(x);
    sum = S::add(sum, weight);
    weighted = S::fma(S::max(x, lowest), weight, weighted);
  }
  made.sum = S::reduce_add(sum);
  made.weighted = S::reduce_add(weighted);
  return made;
}

/// `E`: of the weights.
template <class S, class E>
void summarise_typed(const ExitConfidenceArgs& args, const float* input, int64_t width,
                     int64_t begin, int64_t end, ExitSlice* to) {
  const int64_t rows = args.linear.rows, vocab = args.linear.out_features;
  alignas(64) float logits[kExitRows * kSliceTokens] = {};
  for (int64_t slice = begin; slice < end; ++slice) {
    const int64_t start = slice * kSliceTokens;
    const int64_t stop = start + kSliceTokens < vocab ? start + kSliceTokens : vocab;
    const auto keep = [&](int64_t row, int64_t first, int count, const float* sums) {
      float* place = logits + row * kSliceTokens + (first - start);
      for (int n = 0; n < count; ++n) place[n] = sums[n];
    };
    LinearFeatures<S, E, decltype(keep)>(args.linear, input, width, keep).run(start, stop);
    const int count = static_cast<int>(stop - start);
    for (int64_t row = 0; row < rows; ++row) {
      float* own = logits + row * kSliceTokens;
      finish_logits<S>(args, count, own);
      to[slice * rows + row] = summarise<S>(own, start, count);
    }
  }
}

template <class S>
void summarise_slices(const ExitConfidenceArgs& args, const float* input, int64_t width,
                      int64_t begin, int64_t end, ExitSlice* to) {
  if (args.linear.weight_scales != nullptr) {
    return summarise_typed<S, Int8>(args, input, width, begin, end, to);
  }
  switch (args.linear.dtype) {
    case DType::kFloat32: return summarise_typed<S, Float32>(args, input, width, begin, end, to);
    case DType::kFloat16: return summarise_typed<S, Float16>(args, input, width, begin, end, to);
    default: return summarise_typed<S, Bfloat16>(args, input, width, begin, end, to);
  }
}

}  // namespace
}  // namespace adaptive::cpu
