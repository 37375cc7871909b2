// skinny_linear on CUDA: one warp for each output feature.
//
// A warp streams its weight row, 16 bytes to a lane, and multiplies each load
// with every input row, which stay in cache. Sums go over the lanes by shuffles, always in the same
// order: a row's results depend on that row alone. No workspace, no shared memory, no barrier.

#include "../skinny_linear.h"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../simt/simt.h"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 8;
constexpr int kMaxRows = 16;
constexpr unsigned kAll = 0xffffffffu;

struct LinearProblem {
  SkinnyLinearArgs args;
  bool wide_input, wide_weight;  // rows start on 16-byte boundaries
};

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return simt::from_float<T>(x);
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kLanes* kWarps)
    multiply_rows(const __grid_constant__ LinearProblem p) {
  using V = Vector<T>;
  constexpr int kInFlight = kRows > 4 ? 1 : 2;  // weights; many rows need the registers
  const SkinnyLinearArgs& a = p.args;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t feature =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kLanes;
  if (feature >= a.out_features) return;  // the whole warp
  const T* weight = static_cast<const T*>(a.weight) + feature * a.weight_stride;
  const T* input = static_cast<const T*>(a.input);
  const int rows = static_cast<int>(a.rows), width = static_cast<int>(a.in_features);

  float sum[kRows] = {};
  for (int first = lane * V::kElements; first < width; first += kInFlight * kLanes * V::kElements) {
    V weights[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int column = first + i * kLanes * V::kElements;
      if (column < width) weights[i] = load(weight + column, p.wide_weight);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int column = first + i * kLanes * V::kElements;
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

  const float bias =
      a.bias == nullptr ? 0.0f : simt::to_float(static_cast<const T*>(a.bias)[feature]);
  T* out = static_cast<T*>(a.out) + feature;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      sum[r] += __shfl_xor_sync(kAll, sum[r], distance);
    }
    if (r < rows && lane == r) out[r * a.out_features] = narrow<T>(sum[r] + bias);
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::skinny_linear: " + what);
}

bool on_boundary(const void* base, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 &&
         stride * element_bytes % kVectorBytes == 0;
}

template <class T>
void launch(const SkinnyLinearArgs& a, Stream stream) {
  const LinearProblem p{a, on_boundary(a.input, a.input_stride, sizeof(T)),
                        on_boundary(a.weight, a.weight_stride, sizeof(T))};
  const dim3 grid(static_cast<unsigned>((a.out_features + kWarps - 1) / kWarps));
  const dim3 block(kLanes * kWarps);
  const auto run = [&]<int kRows>() {
    simt::launch<multiply_rows<T, kRows>>("skinny_linear", grid, block, 0, stream, p);
  };
  if (a.rows == 1) return run.template operator()<1>();
  if (a.rows <= 4) return run.template operator()<4>();
  run.template operator()<kMaxRows>();
}

}  // namespace

void skinny_linear(const SkinnyLinearArgs& args, Stream stream) {
  if (args.rows == 0 || args.out_features == 0) return;
  if (args.rows > kMaxRows) {
    refuse("input must have at most 16 rows, got " + std::to_string(args.rows));
  }
  if (args.in_features % 8 || args.in_features > INT32_MAX / 2) {
    refuse("input must have a multiple of 8 features below 2^30, got " +
           std::to_string(args.in_features));
  }
  if (args.out_features > INT32_MAX) {
    refuse("weight must have fewer than 2^31 rows, got " + std::to_string(args.out_features));
  }
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(args, stream);
    case DType::kFloat16: return launch<simt::float16>(args, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(args, stream);
    default: refuse("input must be float32, float16 or bfloat16");
  }
}

}  // namespace adaptive::cuda
