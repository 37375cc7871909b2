// Arithmetic on a panel: a few dozen columns, each a query, that lie in the lanes of vectors. So
// both products of attention are one micro-kernel that broadcasts from keys or values, and the
// softmax never leaves its lanes. Rows of a panel are keys, or elements of a head.

#pragma once

#include "cpu/local_attention_kernel.h"
#include "cpu/local_attention_keys.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

template <class S>
constexpr int kPanelColumns = 2 * S::kWidth;
template <class S>
constexpr int kPanelRows = S::kAccumulators / 2;  // that multiply_panel makes at a time

/// A row of `head_dim` elements as floats, in the element order of load_pair, which all rows share;
/// zeros up to a whole pair of vectors.
template <class S, class E>
ADAPTIVE_INLINE void widen_row(const E* from, int head_dim, float* to) {
  constexpr int kUnit = 2 * S::kWidth;
  typename S::Vec a, b;
  int i = 0;
  for (; i + kUnit <= head_dim; i += kUnit) {
    S::load_pair(from + i, a, b);
    S::store(to + i, a);
    S::store(to + i + S::kWidth, b);
  }
  if (i == head_dim) return;
  S::load_pair_tail(from + i, head_dim - i, a, b);
  S::store(to + i, a);
  S::store(to + i + S::kWidth, b);
}

/// to[r][column] = (to[r][column] +) sum_i a[r * row + i * step] * b[i][column], for kPanelRows
/// rows and all columns.
template <class S, bool kAdd>
ADAPTIVE_INLINE void multiply_panel(const float* a, int row, int step, const float* b, int count,
                                    float* to) {
  constexpr int kPanel = kPanelColumns<S>, kRows = kPanelRows<S>;
  typename S::Vec low[kRows], high[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    low[r] = kAdd ? S::load(to + r * kPanel) : S::zero();
    high[r] = kAdd ? S::load(to + r * kPanel + S::kWidth) : S::zero();
  }
  for (int i = 0; i < count; ++i) {
    const auto b_low = S::load(b + i * kPanel);
    const auto b_high = S::load(b + i * kPanel + S::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto factor = S::set1(a[r * row + i * step]);
      low[r] = S::fma(factor, b_low, low[r]);
      high[r] = S::fma(factor, b_high, high[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    S::store(to + r * kPanel, low[r]);
    S::store(to + r * kPanel + S::kWidth, high[r]);
  }
}

template <class S>
void cap_panel(float softcap, float* scores, int rows) {
  const auto cap = S::set1(softcap);
  for (int i = 0; i < rows * kPanelColumns<S>; i += S::kWidth) {
    S::store(scores + i, S::mul(cap, tanh<S>(S::div(S::load(scores + i), cap))));
  }
}

/// Sets scores of rows [begin, end) of a tile to -inf where a column does not see the key;
/// `scores` is the first of these rows. Positions below 2^24 are exact.
template <class S>
void hide_panel(const KeyTile& tile, int begin, int end, const KeySpan* spans, float* scores) {
  constexpr int kPanel = kPanelColumns<S>;
  float limit[4][kPanel];
  for (int lane = 0; lane < kPanel; ++lane) {
    limit[0][lane] = static_cast<float>(spans[lane].near_begin);
    limit[1][lane] = static_cast<float>(spans[lane].near_end);
    limit[2][lane] = static_cast<float>(spans[lane].sink_begin);
    limit[3][lane] = static_cast<float>(spans[lane].sink_end);
  }
  const auto never = S::set1(-kInfinity);
  for (int row = begin; row < end; ++row, scores += kPanel) {
    const auto key = S::set1(static_cast<float>(tile.position(row)));
    for (int i = 0; i < kPanel; i += S::kWidth) {
      const auto score = row < tile.count ? S::load(scores + i) : never;
      const auto after = S::select_less(key, S::load(limit[0] + i), never, score);
      const auto near = S::select_less(key, S::load(limit[1] + i), after, never);
      const auto behind = S::select_less(key, S::load(limit[2] + i), near, score);
      S::store(scores + i, S::select_less(key, S::load(limit[3] + i), behind, near));
    }
  }
}

/// Turns scores into exp(score - max), and brings `max`, `sum` and `acc`, of `width` rows, to the
/// new maxima.
template <class S>
void weigh_panel(float* scores, int rows, float* max, float* sum, float* acc, int width) {
  constexpr int kPanel = kPanelColumns<S>;
  constexpr float kLargest = 3.4028234663852886e38f;
  for (int i = 0; i < kPanel; i += S::kWidth) {
    const auto old_max = S::load(max + i);
    auto new_max = old_max;
    for (int row = 0; row < rows; ++row) {
      new_max = S::max(S::load(scores + row * kPanel + i), new_max);
    }
    const auto shift = S::select_less(new_max, S::set1(-kLargest), S::zero(), new_max);
    auto total = S::zero();
    for (int row = 0; row < rows; ++row) {
      float* score = scores + row * kPanel + i;
      const auto weight = exp<S>(S::sub(S::load(score), shift));
      S::store(score, weight);
      total = S::add(total, weight);
    }
    const auto grown = S::select_less(old_max, new_max, S::set1(1), S::zero());
    if (S::reduce_max(grown) == 0) {
      S::store(sum + i, S::add(S::load(sum + i), total));
      continue;
    }
    const auto factor = exp<S>(S::sub(old_max, shift));
    S::store(max + i, new_max);
    S::store(sum + i, S::fma(factor, S::load(sum + i), total));
    for (int row = 0; row < width; ++row) {
      float* at = acc + row * kPanel + i;
      S::store(at, S::mul(factor, S::load(at)));
    }
  }
}

}  // namespace
}  // namespace adaptive::cpu
