// The kernel of skinny_linear on a SIMD trait: rounds what linear_features.h sums.

#pragma once

#include "cpu/linear_features.h"
#include "cpu/narrow.h"
#include "cpu/simd.h"
#include "cpu/skinny_linear_kernel.h"

namespace adaptive::cpu {
namespace {

/// Takes a row of the input as it is; whole units, as the kernel reads it.
template <class E>
void copy_row(const SkinnyLinearArgs& args, int64_t row, const E* from, E* to) {
  const int64_t count = row < args.rows ? args.in_features : 0;
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  for (int64_t i = count; i < (args.in_features + kLinearWidth - 1) / kLinearWidth * kLinearWidth;
       ++i)
    to[i] = {};
}

template <class S, class E>
void widen_row(const SkinnyLinearArgs& args, int64_t row, float* to) {
  constexpr int kUnit = 2 * S::kWidth;
  const E* from = static_cast<const E*>(args.input) + row * args.input_stride;
  if constexpr (DotsPairs<S, E>) {
    if (args.weight_scales == nullptr) return copy_row(args, row, from, reinterpret_cast<E*>(to));
  }
  typename S::Vec low, high;
  for (int64_t i = 0; i < args.in_features; i += kUnit) {
    if (row >= args.rows) {
      low = high = S::zero();
    } else if (i + kUnit <= args.in_features) {
      S::load_pair(from + i, low, high);
    } else {
      S::load_pair_tail(from + i, static_cast<int>(args.in_features - i), low, high);
    }
    if (E::kInterleaved && args.weight_scales != nullptr) {  // int8 weights come in their order
      store_unit<S, E>(low, high, to + i);
      continue;
    }
    S::store(to + i, low);
    S::store(to + i + S::kWidth, high);
  }
}

template <class S>
void widen_linear(const SkinnyLinearArgs& args, int64_t row, float* to) {
  switch (args.dtype) {
    case DType::kFloat32: return widen_row<S, Float32>(args, row, to);
    case DType::kFloat16: return widen_row<S, Float16>(args, row, to);
    default: return widen_row<S, Bfloat16>(args, row, to);
  }
}

template <class S, class E>
void multiply_features(const SkinnyLinearArgs& args, const float* input, int64_t width,
                       int64_t begin, int64_t end) {
  const auto store = [&args](int64_t row, int64_t first, int count, const float* sums) {
    E* out = static_cast<E*>(args.out) + row * args.out_features + first;
    for (int n = 0; n < count; ++n) narrow(sums[n], out + n);
  };
  if (args.weight_scales != nullptr) {
    LinearFeatures<S, Int8, decltype(store)>(args, input, width, store).run(begin, end);
  } else {
    LinearFeatures<S, E, decltype(store)>(args, input, width, store).run(begin, end);
  }
}

template <class S>
void multiply_linear(const SkinnyLinearArgs& args, const float* input, int64_t width, int64_t begin,
                     int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32: return multiply_features<S, Float32>(args, input, width, begin, end);
    case DType::kFloat16: return multiply_features<S, Float16>(args, input, width, begin, end);
    default: return multiply_features<S, Bfloat16>(args, input, width, begin, end);
  }
}

template <class S>
constexpr LinearKernel kLinear{&widen_linear<S>, &multiply_linear<S>, DotsPairs<S, Bfloat16>};

}  // namespace
}  // namespace adaptive::cpu
