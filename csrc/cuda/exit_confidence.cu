// exit_confidence on CUDA: a block for each slice of the vocabulary, then a block for each row.
//
// A warp streams some weight rows of its slice, one after another; lane r keeps what they say of
// input row r. The slices follow from the vocabulary alone and every merge has one order, so a
// row's results depend on that row alone, on any device. Logits never leave the registers.

#include "../exit_confidence.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "linear_row.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = kLinearLanes, kWarps = 8;
constexpr int kWarpTokens = 8;
constexpr int kSliceTokens = kWarps * kWarpTokens;
constexpr int kMergeThreads = 256;
constexpr int kBlocksPerMultiprocessor = 3;  // left alone, ptxas takes registers for two
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// What some tokens say of a row. Sums are relative to top[0]; if that is not finite they are
/// undefined.
struct Summary {
  float top[2];
  int32_t tokens[2];  // -1: none
  float sum;          // of exp(x)
  float weighted;     // of x * exp(x)
};

struct ExitProblem {
  LinearProblem linear;
  float scale, softcap;
  int slices;
  Summary* summaries;  // [rows, slices]
  int64_t* tokens;
  float *top, *lse, *entropy;
};

__device__ __forceinline__ Summary nothing() {
  return {{-kInfinity, -kInfinity}, {-1, -1}, 0.0f, 0.0f};
}

/// NaN is the highest of all; of equals the lower token is.
__device__ __forceinline__ bool beats(float x, int32_t token, float y, int32_t other) {
  if (other < 0) return token >= 0;
  if (token < 0) return false;
  const bool x_is_nan = x != x, y_is_nan = y != y;
  if (x_is_nan != y_is_nan) return x_is_nan;
  return x > y || ((x == y || x_is_nan) && token < other);
}

__device__ __forceinline__ Summary merge(const Summary& a, const Summary& b) {
  const bool first = beats(a.top[0], a.tokens[0], b.top[0], b.tokens[0]);
  const Summary high = first ? a : b, low = first ? b : a;
  Summary made = high;
  if (beats(low.top[0], low.tokens[0], high.top[1], high.tokens[1])) {
    made.top[1] = low.top[0];
    made.tokens[1] = low.tokens[0];
  }
  if (low.top[0] == -kInfinity) return made;                           // adds nothing
  const float shift = low.top[0] - high.top[0], weight = expf(shift);  // may be -inf and 0
  made.sum += weight * low.sum;
  made.weighted += weight * (low.weighted + fmaxf(shift, -100.0f) * low.sum);
  return made;
}

template <class T, class W, int kRows>
__global__ void __launch_bounds__(kLanes* kWarps, kBlocksPerMultiprocessor)
    summarise_slice(const __grid_constant__ ExitProblem p) {
  const SkinnyLinearArgs& a = p.linear.args;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSliceTokens + warp * kWarpTokens;

  Summary mine = nothing();
  for (int64_t token = first; token < first + kWarpTokens && token < a.out_features; ++token) {
    float sum[kRows];
    multiply_feature<T, W>(p.linear, token, lane, sum);
    float logit = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float whole = sum_lanes(sum[r]);
      if (lane == r) logit = whole;
    }
    logit = (logit + bias_of<T>(a, token)) * p.scale;
    if (p.softcap > 0.0f) logit = p.softcap * tanhf(logit / p.softcap);
    mine = merge(mine, {{logit, -kInfinity}, {static_cast<int32_t>(token), -1}, 1.0f, 0.0f});
  }

  SHARED(Summary[kWarps][kRows], of_warps);
  if (lane < kRows) of_warps[warp][lane] = mine;
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  if (row >= a.rows) return;
  Summary all = of_warps[0][row];
  for (int w = 1; w < kWarps; ++w) all = merge(all, of_warps[w][row]);
  p.summaries[static_cast<int64_t>(row) * p.slices + blockIdx.x] = all;
}

__global__ void __launch_bounds__(kMergeThreads)
    merge_slices(const __grid_constant__ ExitProblem p) {
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const Summary* summaries = p.summaries + static_cast<int64_t>(row) * p.slices;
  Summary mine = nothing();
  for (int slice = thread; slice < p.slices; slice += kMergeThreads) {
    mine = merge(mine, summaries[slice]);
  }
  SHARED(Summary[kMergeThreads], of_threads);
  of_threads[thread] = mine;
  for (int half = kMergeThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) of_threads[thread] = merge(of_threads[thread], of_threads[thread + half]);
  }
  if (thread != 0) return;
  const Summary all = of_threads[0];
#pragma unroll
  for (int place = 0; place < 2; ++place) {
    p.tokens[row * 2 + place] = all.tokens[place];
    p.top[row * 2 + place] = all.top[place];
  }
  const float max = all.top[0];
  const bool finite = fabsf(max) < kInfinity;  // false for NaN
  p.lse[row] = finite ? max + logf(all.sum) : max;
  p.entropy[row] = finite ? logf(all.sum) - all.weighted / all.sum : kNaN;
}

int64_t slices_of(const ExitConfidenceArgs& args) {
  return (args.linear.out_features + kSliceTokens - 1) / kSliceTokens;
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::exit_confidence: " + what);
}

}  // namespace

int64_t exit_confidence_workspace_bytes(const ExitConfidenceArgs& args) {
  return args.linear.rows * slices_of(args) * static_cast<int64_t>(sizeof(Summary));
}

void exit_confidence(const ExitConfidenceArgs& args, Stream stream) {
  if (args.linear.rows == 0) return;
  check_linear(args.linear, "exit_confidence", "hidden");
  if (args.linear.out_features == 0) refuse("weight must have a row for each token, got 0");
  const int64_t wanted = exit_confidence_workspace_bytes(args);
  if (args.workspace_bytes < wanted) {
    refuse("workspace must have " + std::to_string(wanted) + " bytes, got " +
           std::to_string(args.workspace_bytes));
  }
  ExitProblem p{{},
                args.scale,
                args.softcap,
                static_cast<int>(slices_of(args)),
                static_cast<Summary*>(args.workspace),
                args.tokens,
                args.top,
                args.lse,
                args.entropy};
  for_linear(args.linear, [&]<class T, class W, int kRows>() {
    p.linear = linear_problem<T, W>(args.linear);
    simt::launch<summarise_slice<T, W, kRows>>("exit_confidence",
                                               dim3(static_cast<unsigned>(p.slices)),
                                               dim3(kLanes * kWarps), 0, stream, p);
  });
  simt::launch<merge_slices>("exit_confidence", dim3(static_cast<unsigned>(args.linear.rows)),
                             dim3(kMergeThreads), 0, stream, p);
}

}  // namespace adaptive::cuda
