// skinny_linear on CUDA: one warp for each output feature. No workspace, no shared memory, no
// barrier.

#include <type_traits>

#include "linear_row.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = kLinearLanes, kWarps = 8;

template <class T>
__device__ __forceinline__ T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return simt::from_float<T>(x);
  }
}

template <class T, class W, int kRows>
__global__ void __launch_bounds__(kLanes* kWarps)
    multiply_rows(const __grid_constant__ LinearProblem p) {
  const SkinnyLinearArgs& a = p.args;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t feature =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kLanes;
  if (feature >= a.out_features) return;  // the whole warp
  float sum[kRows];
  multiply_feature<T, W>(p, feature, lane, sum);
  const float bias = bias_of<T>(a, feature);
  T* out = static_cast<T*>(a.out) + feature;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float whole = sum_lanes(sum[r]);
    if (r < a.rows && lane == r) out[r * a.out_features] = narrow<T>(whole + bias);
  }
}

}  // namespace

void skinny_linear(const SkinnyLinearArgs& args, Stream stream) {
  if (args.rows == 0 || args.out_features == 0) return;
  check_linear(args, "skinny_linear", "input");
  const dim3 grid(static_cast<unsigned>((args.out_features + kWarps - 1) / kWarps));
  for_linear(args, [&]<class T, class W, int kRows>() {
    simt::launch<multiply_rows<T, W, kRows>>("skinny_linear", grid, dim3(kLanes * kWarps), 0,
                                             stream, linear_problem<T, W>(args));
  });
}

}  // namespace adaptive::cuda
