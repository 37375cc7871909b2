// The kernel of prefix_row_ffn on a SIMD trait. Rows come from the widest on, so those that use a
// neuron are the first ones, and each neuron's weights are read once, for them alone. The products
// are skinny_linear's own.

#pragma once

#include "cpu/linear_features.h"
#include "cpu/narrow.h"
#include "cpu/prefix_row_ffn_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

template <class S>
ADAPTIVE_INLINE typename S::Vec activated(Activation activation, typename S::Vec x) {
  const auto one = S::set1(1.0f);
  if (activation == Activation::kRelu) return S::max(S::zero(), x);
  if (activation == Activation::kSilu) {
    const auto capped = S::min(S::set1(88.0f), S::sub(S::zero(), x));  // what exp takes
    return S::div(x, S::add(one, exp<S>(capped)));
  }
  const auto cube = S::mul(S::mul(x, x), x);
  const auto inner = S::mul(S::set1(0.79788456f), S::fma(S::set1(0.044715f), cube, x));
  return S::mul(S::mul(S::set1(0.5f), x), S::add(one, tanh<S>(inner)));
}

/// Where a kernel reads neuron `i` of a chunk: as load_pair orders weights of type E.
template <class S, class E>
ADAPTIVE_INLINE int place_of(int i) {
  constexpr int kUnit = 2 * S::kWidth;
  return E::kInterleaved ? i / kUnit * kUnit + i % 2 * S::kWidth + i % kUnit / 2 : i;
}

/// Products of the neurons from `begin` on with each row that uses them, kPrefixNeurons to a row.
template <class S, class E>
void multiply_users(const PrefixRowFfnArgs& args, const PrefixRows& rows, const void* weight,
                    int64_t stride, int64_t begin, float* sums) {
  SkinnyLinearArgs linear{};
  linear.weight = weight;
  linear.weight_stride = stride;
  linear.in_features = args.in_features;
  linear.out_features = rows.widths[0];
  const auto keep = [&](int64_t row, int64_t first, int count, const float* made) {
    const int start = static_cast<int>(first - begin);
    for (int n = 0; n < count; ++n) {
      sums[row * kPrefixNeurons + place_of<S, E>(start + n)] = made[n];
    }
  };
  const int64_t stop = begin + kPrefixNeurons;
  int64_t users = rows.count;
  for (int64_t first = begin; first < stop;) {
    while (users > 0 && rows.widths[users - 1] <= first) --users;
    if (users == 0) return;
    const int64_t narrowest = rows.widths[users - 1], end = narrowest < stop ? narrowest : stop;
    linear.rows = users;
    LinearFeatures<S, E, decltype(keep)>(linear, rows.input, rows.input_width, keep)
        .run(first, end);
    first = end;
  }
}

template <class S, class E>
void activate_typed(const PrefixRowFfnArgs& args, const PrefixRows& rows, int64_t begin) {
  // An activation function makes 0 of 0: what is not multiplied adds nothing.
  alignas(64) float ups[kMaxPrefixRows * kPrefixNeurons] = {};
  alignas(64) float gates[kMaxPrefixRows * kPrefixNeurons] = {};
  const bool gated = args.gate != nullptr;
  if (gated) multiply_users<S, E>(args, rows, args.gate, args.gate_stride, begin, gates);
  multiply_users<S, E>(args, rows, args.up, args.up_stride, begin, ups);
  for (int64_t row = 0; row < rows.padded; ++row) {
    float* to = rows.hidden + row * rows.hidden_width + begin;
    for (int i = 0; i < kPrefixNeurons; i += S::kWidth) {
      const auto up = S::load(ups + row * kPrefixNeurons + i);
      const auto from = gated ? S::load(gates + row * kPrefixNeurons + i) : up;
      const auto made = activated<S>(args.activation, from);
      S::store(to + i, gated ? S::mul(made, up) : made);
    }
  }
}

template <class S, class E>
void project_typed(const PrefixRowFfnArgs& args, const PrefixRows& rows, int64_t begin,
                   int64_t end) {
  SkinnyLinearArgs linear{};
  linear.weight = args.down;
  linear.weight_stride = args.down_stride;
  linear.rows = rows.count;
  linear.out_features = args.out_features;
  const auto round = [&](int64_t row, int64_t first, int count, const float* sums) {
    E* out = static_cast<E*>(args.out) + rows.order[row] * args.out_features + first;
    for (int n = 0; n < count; ++n) narrow(sums[n], out + n);
  };
  LinearFeatures<S, E, decltype(round), true>(linear, rows.hidden, rows.hidden_width, round,
                                              rows.widths)
      .run(begin, end);
}

template <class S>
void activate_prefix(const PrefixRowFfnArgs& args, const PrefixRows& rows, int64_t begin) {
  switch (args.dtype) {
    case DType::kFloat32: return activate_typed<S, Float32>(args, rows, begin);
    case DType::kFloat16: return activate_typed<S, Float16>(args, rows, begin);
    default: return activate_typed<S, Bfloat16>(args, rows, begin);
  }
}

template <class S>
void project_prefix(const PrefixRowFfnArgs& args, const PrefixRows& rows, int64_t begin,
                    int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32: return project_typed<S, Float32>(args, rows, begin, end);
    case DType::kFloat16: return project_typed<S, Float16>(args, rows, begin, end);
    default: return project_typed<S, Bfloat16>(args, rows, begin, end);
  }
}

template <class S>
constexpr PrefixKernel kPrefix{&activate_prefix<S>, &project_prefix<S>};

}  // namespace
}  // namespace adaptive::cpu
