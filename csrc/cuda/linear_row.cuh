// The product that reads a weight once, on CUDA: a warp streams the weight row of one feature, 16
// bytes to a lane, and multiplies each load with every input row, which stay in cache. Sums go over
// the lanes by shuffles, always in the same order: a row's sum depends on that row alone.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

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

template <class T>
LinearProblem linear_problem(const SkinnyLinearArgs& a) {
  const auto on_boundary = [](const void* base, int64_t stride) {
    return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 &&
           stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  };
  return {a, on_boundary(a.input, a.input_stride), on_boundary(a.weight, a.weight_stride)};
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
}

/// Calls run<T, kRows>() for the dtype and a bound on the rows that the kernels are compiled for.
template <class Run>
void for_linear(const SkinnyLinearArgs& a, Run&& run) {
  const auto with_rows = [&]<class T>() {
    if (a.rows == 1) return run.template operator()<T, 1>();
    if (a.rows <= 4) return run.template operator()<T, 4>();
    run.template operator()<T, kMaxLinearRows>();
  };
  switch (a.dtype) {
    case DType::kFloat32: return with_rows.template operator()<float>();
    case DType::kFloat16: return with_rows.template operator()<simt::float16>();
    case DType::kBfloat16: return with_rows.template operator()<simt::bfloat16>();
    default: throw std::invalid_argument("adaptive: a linear layer of a dtype without kernel");
  }
}

/// Each lane's part of the sums of every row with the weight row of `feature`: sum_lanes has the
/// whole. Rows beyond the last are 0.
template <class T, int kRows>
__device__ __forceinline__ void multiply_feature(const LinearProblem& p, int64_t feature, int lane,
                                                 float (&sum)[kRows]) {
  using V = Vector<T>;
  constexpr int kInFlight = kRows > 4 ? 1 : 2;  // weights; many rows need the registers
  const SkinnyLinearArgs& a = p.args;
  const T* weight = static_cast<const T*>(a.weight) + feature * a.weight_stride;
  const T* input = static_cast<const T*>(a.input);
  const int rows = static_cast<int>(a.rows), width = static_cast<int>(a.in_features);

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
        if (r >= rows) continue;
        const V inputs = load(input + r * a.input_stride + column, p.wide_input);
#pragma unroll
        for (int e = 0; e < V::kElements; ++e) {
          sum[r] += simt::to_float(inputs.x[e]) * simt::to_float(weights[i].x[e]);
        }
      }
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
