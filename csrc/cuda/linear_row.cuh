// The product that reads a weight once, on CUDA: a warp streams the weight row of one feature, 16
// bytes to a lane, and multiplies each load with every input row, which stay in cache. Sums go over
// the lanes by shuffles, always in the same order: a row's sum depends on that row alone. Weights
// are of the inputs' type, or int8 with a factor for each group of columns.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../simt/simt.h"
#include "../skinny_linear.h"
#include "vector.cuh"

namespace adaptive::cuda {

constexpr int kLinearLanes = 32;
constexpr int kMaxLinearRows = 16;

struct LinearProblem {
  SkinnyLinearArgs args;
  bool wide_input, wide_weight;  // rows start on 16-byte boundaries
};

/// `T`: of the inputs and the bias. `W`: of the weights, T or int8_t.
template <class T, class W>
LinearProblem linear_problem(const SkinnyLinearArgs& a) {
  const auto on_boundary = [](const void* base, int64_t stride, size_t element_bytes) {
    return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 &&
           stride * static_cast<int64_t>(element_bytes) % kVectorBytes == 0;
  };
  return {a, on_boundary(a.input, a.input_stride, sizeof(T)),
          on_boundary(a.weight, a.weight_stride, sizeof(W))};
}

/// Throws what the bindings would have refused, in the name of `op`, whose input is called `name`.
inline void check_linear(const SkinnyLinearArgs& a, const std::string& op,
                         const std::string& name) {
  const auto refuse = [&op](const std::string& what, int64_t got) {
    throw std::invalid_argument("adaptive::" + op + ": " + what + ", got " + std::to_string(got));
  };
  if (a.rows > kMaxLinearRows) refuse(name + " must have at most 16 rows", a.rows);
  if (a.in_features % 8 || a.in_features > INT32_MAX / 2) {
    refuse(name + " must have a multiple of 8 features below 2^30", a.in_features);
  }
  if (a.out_features > INT32_MAX) {
    refuse("weight must have fewer than 2^31 rows", a.out_features);
  }
  const bool fits = a.group >= 32 && (a.group & (a.group - 1)) == 0 && a.in_features % a.group == 0;
  if (a.weight_scales != nullptr && !fits) {
    refuse("weight_scales must be of groups of a power of two from 32 on", a.group);
  }
}

/// Calls run<T, W, kRows>() for the dtypes and a bound on the rows that the kernels are compiled
/// for.
template <class Run>
void for_linear(const SkinnyLinearArgs& a, Run&& run) {
  const auto with_weights = [&]<class T, class W>() {
    if (a.rows == 1) return run.template operator()<T, W, 1>();
    if (a.rows <= 4) return run.template operator()<T, W, 4>();
    run.template operator()<T, W, kMaxLinearRows>();
  };
  const auto with_rows = [&]<class T>() {
    if (a.weight_scales != nullptr) return with_weights.template operator()<T, int8_t>();
    with_weights.template operator()<T, T>();
  };
  switch (a.dtype) {
    case DType::kFloat32: return with_rows.template operator()<float>();
    case DType::kFloat16: return with_rows.template operator()<simt::float16>();
    case DType::kBfloat16: return with_rows.template operator()<simt::bfloat16>();
    default: throw std::invalid_argument("adaptive: a linear layer of a dtype without kernel");
  }
}

/// Each lane's part of the sums of the rows with a weight row, of `width` columns; of those columns
/// for which takes(row, column) is true, where it is asked for 16 bytes of weights at a time.
/// `T`: of the inputs. `W`: of the weights, T or smaller.
template <class T, class W, int kRows, class Takes>
__device__ __forceinline__ void multiply_taken(const LinearProblem& p, int64_t feature, int lane,
                                               int width, Takes&& takes, float (&sum)[kRows]) {
  using V = Vector<W>;
  using Inputs = Vector<T>;
  constexpr int kInFlight = kRows > 4 ? 1 : 2;  // weights; many rows need the registers
  const SkinnyLinearArgs& a = p.args;
  const W* weight = static_cast<const W*>(a.weight) + feature * a.weight_stride;
  const T* input = static_cast<const T*>(a.input);

#pragma unroll
  for (int r = 0; r < kRows; ++r) sum[r] = 0.0f;
  for (int first = lane * V::kElements; first < width;
       first += kInFlight * kLinearLanes * V::kElements) {
    V weights[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int column = first + i * kLinearLanes * V::kElements;
      if (column < width) weights[i] = load(weight + column, p.wide_weight);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int column = first + i * kLinearLanes * V::kElements;
      if (column >= width) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!takes(r, column)) continue;
#pragma unroll
        for (int part = 0; part < V::kElements; part += Inputs::kElements) {
          const Inputs inputs = load(input + r * a.input_stride + column + part, p.wide_input);
#pragma unroll
          for (int e = 0; e < Inputs::kElements; ++e) {
            sum[r] += simt::to_float(inputs.x[e]) * simt::to_float(weights[i].x[part + e]);
          }
        }
      }
    }
  }
}

/// multiply_feature for weights of the inputs' type.
template <class T, int kRows>
__device__ __forceinline__ void multiply_plain(const LinearProblem& p, int64_t feature, int lane,
                                               float (&sum)[kRows]) {
  const int rows = static_cast<int>(p.args.rows), width = static_cast<int>(p.args.in_features);
  const auto takes = [rows](int row, int) { return row < rows; };
  multiply_taken<T, T>(p, feature, lane, width, takes, sum);
}

/// sum[r] += input row r * the int8 weights of one load, which lie in one group.
template <class T, int kRows>
__device__ __forceinline__ void add_scaled(const LinearProblem& p, const Vector<int8_t>& weights,
                                           float scale, int column, float (&sum)[kRows]) {
  using V = Vector<T>;
  const SkinnyLinearArgs& a = p.args;
  const T* input = static_cast<const T*>(a.input) + column;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= a.rows) continue;
#pragma unroll
    for (int part = 0; part < Vector<int8_t>::kElements; part += V::kElements) {
      const V inputs = load(input + r * a.input_stride + part, p.wide_input);
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) {
        const float weight = static_cast<float>(weights.x[part + e]) * scale;
        sum[r] += simt::to_float(inputs.x[e]) * weight;
      }
    }
  }
}

/// Each lane's part of the sums of every row with the weight row of `feature`: sum_lanes has the
/// whole. Rows beyond the last are 0.
template <class T, class W, int kRows>
__device__ __forceinline__ void multiply_feature(const LinearProblem& p, int64_t feature, int lane,
                                                 float (&sum)[kRows]) {
  if constexpr (std::is_same_v<W, T>) {
    multiply_plain<T>(p, feature, lane, sum);
  } else {
    using V = Vector<int8_t>;
    const SkinnyLinearArgs& a = p.args;
    const int8_t* weight = static_cast<const int8_t*>(a.weight) + feature * a.weight_stride;
    const float* scales = a.weight_scales + feature * a.scales_stride;
    const int group = static_cast<int>(a.group);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = 0.0f;
    for (int column = lane * V::kElements; column < a.in_features;
         column += kLinearLanes * V::kElements) {
      const V weights = load(weight + column, p.wide_weight);
      add_scaled<T>(p, weights, scales[column / group], column, sum);
    }
  }
}

/// The sum over the warp, in every lane.
__device__ __forceinline__ float sum_lanes(float part) {
#pragma unroll
  for (int distance = kLinearLanes / 2; distance > 0; distance /= 2) {
    part += __shfl_xor_sync(~0u, part, distance);
  }
  return part;
}

template <class T>
__device__ __forceinline__ float bias_of(const SkinnyLinearArgs& a, int64_t feature) {
  return a.bias == nullptr ? 0.0f : simt::to_float(static_cast<const T*>(a.bias)[feature]);
}

}  // namespace adaptive::cuda
