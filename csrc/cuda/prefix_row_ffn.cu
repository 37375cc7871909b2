// prefix_row_ffn on CUDA: one warp for each neuron, then one for each output feature.
//
// A warp streams the weights of its neuron once and multiplies them with the rows that use it; what
// the neurons hold goes to the workspace in float32, with 0 where a row does not use one. A second
// kernel's warps stream rows of `down` as far as the widest row needs, each row as far as its own
// width. Widths stay on the device: nothing waits for the host, and warps of neurons that nobody
// uses leave at once.

#include "../prefix_row_ffn.h"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "linear_row.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = kLinearLanes, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kStep = 8;  // neurons; no vector of weights has more

static_assert(kMaxPrefixRows == kMaxLinearRows);
static_assert(kStep % kWarps == 0);  // every warp has a neuron

struct PrefixProblem {
  LinearProblem gate, up;  // of the input; a null weight: no gate
  LinearProblem down;      // of the workspace, [rows, neurons], float
  const int64_t* widths;
  Activation activation;
};

/// Neurons of a row, rounded up to what vectors hold; beyond `width` there are zeros.
__device__ __forceinline__ int padded(int64_t width, int neurons) {
  const int64_t inside = width < 0 ? 0 : width < neurons ? width : neurons;
  return static_cast<int>((inside + kStep - 1) / kStep * kStep);
}

__device__ __forceinline__ float activated(Activation activation, float x) {
  if (activation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if (activation == Activation::kSilu) return x / (1.0f + expf(-x));
  return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads)
    activate_neurons(const __grid_constant__ PrefixProblem p) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int rows = static_cast<int>(p.down.args.rows);
  const int neurons = static_cast<int>(p.down.args.in_features);
  const int neuron = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kLanes;
  unsigned users = 0;
  bool read = false;  // by the second kernel, of some row
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
    const int64_t width = p.widths[r];
    users |= static_cast<unsigned>(neuron < width) << r;
    read |= neuron < padded(width, neurons);
  }
  if (!read) return;
  float gate[kRows], up[kRows];
  const auto takes = [users](int row, int) { return (users >> row & 1) != 0; };
  const bool gated = p.gate.args.weight != nullptr;
  const int width = static_cast<int>(p.up.args.in_features);
  if (gated && users != 0) multiply_taken<T, T>(p.gate, neuron, lane, width, takes, gate);
  if (users != 0) multiply_taken<T, T>(p.up, neuron, lane, width, takes, up);
  float* hidden = const_cast<float*>(static_cast<const float*>(p.down.args.input)) + neuron;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float held = 0.0f;
    if (users >> r & 1) {  // the whole warp
      held = sum_lanes(up[r]);
      held = gated ? activated(p.activation, sum_lanes(gate[r])) * held
                   : activated(p.activation, held);
    }
    if (r < rows && lane == r) hidden[static_cast<int64_t>(r) * neurons] = held;
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) project_rows(const __grid_constant__ PrefixProblem p) {
  const SkinnyLinearArgs& a = p.down.args;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int rows = static_cast<int>(a.rows), neurons = static_cast<int>(a.in_features);
  SHARED(int[kMaxPrefixRows], ends);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < rows) ends[thread] = padded(p.widths[thread], neurons);
  __syncthreads();
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kWarps + thread / kLanes;
  if (feature >= a.out_features) return;  // the whole warp
  int widest = 0;
  for (int r = 0; r < rows; ++r) widest = ends[r] > widest ? ends[r] : widest;
  float sum[kRows];
  const auto takes = [&](int row, int column) { return row < rows && column < ends[row]; };
  multiply_taken<float, T>(p.down, feature, lane, widest, takes, sum);
  T* out = static_cast<T*>(a.out) + feature;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float whole = sum_lanes(sum[r]);
    if (r >= rows || lane != r) continue;
    if constexpr (std::is_same_v<T, float>) {
      out[r * a.out_features] = whole;
    } else {
      out[r * a.out_features] = simt::from_float<T>(whole);
    }
  }
}

template <class T>
void launch(const PrefixRowFfnArgs& args, float* hidden, Stream stream) {
  SkinnyLinearArgs first{};
  first.input = args.input;
  first.dtype = args.dtype;
  first.rows = args.rows;
  first.in_features = args.in_features;
  first.out_features = args.neurons;
  first.input_stride = args.input_stride;
  SkinnyLinearArgs gate = first, up = first, down = first;
  gate.weight = args.gate;
  gate.weight_stride = args.gate_stride;
  up.weight = args.up;
  up.weight_stride = args.up_stride;
  down.input = hidden;
  down.input_stride = down.in_features = args.neurons;
  down.weight = args.down;
  down.weight_stride = args.down_stride;
  down.out = args.out;
  down.out_features = args.out_features;
  const PrefixProblem p{linear_problem<T, T>(gate), linear_problem<T, T>(up),
                        linear_problem<float, T>(down), args.widths, args.activation};
  const auto blocks = [](int64_t warps) {
    return dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps));
  };
  const auto run = [&]<int kRows>() {
    if (args.neurons > 0) {
      simt::launch<activate_neurons<T, kRows>>("prefix_row_ffn", blocks(args.neurons),
                                               dim3(kThreads), 0, stream, p);
    }
    simt::launch<project_rows<T, kRows>>("prefix_row_ffn", blocks(args.out_features),
                                         dim3(kThreads), 0, stream, p);
  };
  if (args.rows == 1) return run.template operator()<1>();
  if (args.rows <= 4) return run.template operator()<4>();
  run.template operator()<kMaxPrefixRows>();
}

}  // namespace

int64_t prefix_row_ffn_workspace_bytes(const PrefixRowFfnArgs& args) {
  return args.rows * args.neurons * static_cast<int64_t>(sizeof(float));
}

void prefix_row_ffn(const PrefixRowFfnArgs& args, void* workspace, int64_t workspace_bytes,
                    Stream stream) {
  const auto refuse = [](const std::string& what, int64_t got) {
    throw std::invalid_argument("adaptive::prefix_row_ffn: " + what + ", got " +
                                std::to_string(got));
  };
  if (args.rows == 0 || args.out_features == 0) return;
  if (args.rows > kMaxPrefixRows) refuse("input must have at most 16 rows", args.rows);
  if (args.in_features % 8 || args.in_features > INT32_MAX / 2) {
    refuse("input must have a multiple of 8 features below 2^30", args.in_features);
  }
  if (args.neurons % kStep || args.neurons > INT32_MAX / 2) {
    refuse("up must have a multiple of 8 neurons below 2^30", args.neurons);
  }
  if (args.out_features > INT32_MAX) {
    refuse("down must have fewer than 2^31 rows", args.out_features);
  }
  const int64_t wanted = prefix_row_ffn_workspace_bytes(args);
  if (workspace_bytes < wanted) {
    refuse("workspace must have " + std::to_string(wanted) + " bytes", workspace_bytes);
  }
  float* hidden = static_cast<float*>(workspace);
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(args, hidden, stream);
    case DType::kFloat16: return launch<simt::float16>(args, hidden, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(args, hidden, stream);
    default: throw std::invalid_argument("adaptive::prefix_row_ffn: a dtype without kernel");
  }
}

}  // namespace adaptive::cuda
