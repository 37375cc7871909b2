// The kernels of merge_tokens, templates on a SIMD trait and an element type.

#pragma once

#include "cpu/merge_tokens_kernel.h"
#include "cpu/narrow.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

constexpr float kLeastNorm = 1e-12f;  // a metric of zeros has cosine 0 with all
constexpr float kNoCosine = -2.0f;    // stands for NaN

/// Calls take(column, count, low, high) for the elements of a row, up to 2 * kWidth at a time.
template <class S, class E, class Take>
ADAPTIVE_INLINE void each_unit(const E* from, int64_t width, const Take& take) {
  constexpr int kUnit = 2 * S::kWidth;
  typename S::Vec low, high;
  int64_t column = 0;
  for (; column + kUnit <= width; column += kUnit) {
    S::load_pair(from + column, low, high);
    take(column, kUnit, low, high);
  }
  if (column < width) {
    const int tail = static_cast<int>(width - column);
    S::load_pair_tail(from + column, tail, low, high);
    take(column, tail, low, high);
  }
}

/// Writes a row over its length, in the order that load_pair gives: cosines do not mind.
template <class S, class E>
void write_unit(const E* from, int64_t width, float* to) {
  auto sum = S::zero();
  each_unit<S>(from, width, [&](int64_t column, int, typename S::Vec low, typename S::Vec high) {
    sum = S::fma(low, low, S::fma(high, high, sum));
    S::store(to + column, low);
    S::store(to + column + S::kWidth, high);
  });
  constexpr int kUnit = 2 * S::kWidth;
  const int64_t padded = padded_metric(width);
  for (int64_t i = (width + kUnit - 1) / kUnit * kUnit; i < padded; i += S::kWidth) {
    S::store(to + i, S::zero());
  }
  const float norm = __builtin_sqrtf(S::reduce_add(sum));
  const auto length = S::set1(norm < kLeastNorm ? kLeastNorm : norm);
  for (int64_t i = 0; i < padded; i += S::kWidth) {
    S::store(to + i, S::div(S::load(to + i), length));
  }
}

template <class S, class E>
void match_typed(const MergeTokensArgs& a, const MergeMatch& m) {
  const int64_t padded = padded_metric(a.metric_width);
  const E* metric = static_cast<const E*>(a.metric) + m.row * a.metric_stride[0];
  float* const targets = m.units + m.sources * padded;
  for (int64_t i = 0; i < m.sources; ++i) {
    write_unit<S>(metric + (a.first_source() + 2 * i) * a.metric_stride[1], a.metric_width,
                  m.units + i * padded);
  }
  for (int64_t i = 0; i < m.targets; ++i) {
    write_unit<S>(metric + (a.first_target() + 2 * i) * a.metric_stride[1], a.metric_width,
                  targets + i * padded);
  }
  for (int64_t i = 0; i < m.sources; ++i) {
    const float* unit = m.units + i * padded;
    float best = -kInfinity;
    int64_t found = 0;
    for (int64_t first = 0; first < m.targets; first += 4) {
      const float* t = targets + first * padded;
      auto s0 = S::zero(), s1 = S::zero(), s2 = S::zero(), s3 = S::zero();
      for (int64_t c = 0; c < padded; c += S::kWidth) {
        const auto x = S::load(unit + c);
        s0 = S::fma(x, S::load(t + c), s0);
        s1 = S::fma(x, S::load(t + padded + c), s1);
        s2 = S::fma(x, S::load(t + 2 * padded + c), s2);
        s3 = S::fma(x, S::load(t + 3 * padded + c), s3);
      }
      float cosines[4];
      S::reduce4(s0, s1, s2, s3, cosines);
      for (int64_t j = 0; j < 4 && first + j < m.targets; ++j) {
        const float cosine = cosines[j] != cosines[j] ? kNoCosine : cosines[j];
        if (cosine > best) {
          best = cosine;
          found = first + j;
        }
      }
    }
    m.best[i] = best;
    m.target[i] = static_cast<int32_t>(found);
  }
}

template <class S, class E>
void average_typed(const MergeTokensArgs& a, const MergeGroup& g) {
  const E* hidden = static_cast<const E*>(a.hidden) + g.row * a.hidden_stride[0];
  const float* sizes = a.sizes != nullptr ? a.sizes + g.row * a.tokens : nullptr;
  const int64_t place = g.row * a.kept() + g.slot;
  E* out = static_cast<E*>(a.out) + place * a.width;
  float total = 0;
  for (int64_t i = 0; i < g.count; ++i) total += sizes != nullptr ? sizes[g.members[i]] : 1.0f;
  a.out_sizes[place] = total;
  if (g.count == 1) {
    __builtin_memcpy(out, hidden + g.members[0] * a.hidden_stride[1], a.width * sizeof(E));
    return;
  }
  constexpr int kUnit = 2 * S::kWidth;
  for (int64_t column = 0; column < a.width; column += kUnit) {
    const int64_t width = a.width - column < kUnit ? a.width - column : kUnit;
    auto low = S::zero(), high = S::zero();
    for (int64_t i = 0; i < g.count; ++i) {
      const auto size = S::set1(sizes != nullptr ? sizes[g.members[i]] : 1.0f);
      each_unit<S>(hidden + g.members[i] * a.hidden_stride[1] + column, width,
                   [&](int64_t, int, typename S::Vec x, typename S::Vec y) {
                     low = S::fma(size, x, low);
                     high = S::fma(size, y, high);
                   });
    }
    float mean[kUnit];
    const auto divisor = S::set1(total);
    store_unit<S, E>(S::div(low, divisor), S::div(high, divisor), mean);
    for (int64_t c = 0; c < width; ++c) narrow(mean[c], out + column + c);
  }
}

template <class S>
void match_sources(const MergeTokensArgs& args, const MergeMatch& match) {
  switch (args.dtype) {
    case DType::kFloat32: return match_typed<S, Float32>(args, match);
    case DType::kFloat16: return match_typed<S, Float16>(args, match);
    default: return match_typed<S, Bfloat16>(args, match);
  }
}

template <class S>
void average_group(const MergeTokensArgs& args, const MergeGroup& group) {
  switch (args.dtype) {
    case DType::kFloat32: return average_typed<S, Float32>(args, group);
    case DType::kFloat16: return average_typed<S, Float16>(args, group);
    default: return average_typed<S, Bfloat16>(args, group);
  }
}

}  // namespace
}  // namespace adaptive::cpu
