// sparse_row_ffn on CUDA: a block takes the two products of 128 neurons, a second kernel adds up.
//
// A block lists which of its neurons any row needs, in order; its warps take the products with rows
// of `up`, one neuron each; then its threads, 16 bytes of columns each, add up rows of `down`. What
// is listed and added follows from a row's own activations, so results depend on that row alone,
// and nothing waits for the host.

#include "../sparse_row_ffn.h"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../simt/simt.h"
#include "linear_row.cuh"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = kLinearLanes, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kNeurons = 128;  // of a block
constexpr int kTileRows = 4;   // rows whose sums a thread holds
constexpr int kMaxRows = 16;

struct SparseProblem {
  SparseRowFfnArgs args;
  bool wide_input, wide_up, wide_down;  // rows start on 16-byte boundaries
  float* sums;                          // [parts, rows, out_features]
  int64_t parts;
};

/// The neurons of a block that some row needs.
struct Listed {
  int count;
  int neuron[kNeurons];     // of the block, ascending
  unsigned rows[kNeurons];  // one bit each
  float weight[kNeurons][kMaxRows];
};

/// Fills `count`, `neuron` and `rows`. Ends with a barrier.
template <class T>
__device__ void list_active(const SparseRowFfnArgs& a, int64_t begin, Listed& listed) {
  SHARED(int[kNeurons / kLanes], found);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  unsigned rows = 0, active = 0;
  if (thread < kNeurons) {  // whole warps
    const int64_t neuron = begin + thread;
    const T* activations = static_cast<const T*>(a.activations) + neuron;
    for (int row = 0; row < a.rows && neuron < a.neurons; ++row) {
      const bool needed = simt::to_float(activations[row * a.activations_stride]) != 0.0f;
      rows |= static_cast<unsigned>(needed) << row;
    }
    active = __ballot_sync(~0u, rows != 0);
    if (lane == 0) found[warp] = __popc(active);
  }
  __syncthreads();
  if (thread < kNeurons && rows != 0) {
    int place = __popc(active & ((1u << lane) - 1));
    for (int w = 0; w < warp; ++w) place += found[w];
    listed.neuron[place] = thread;
    listed.rows[place] = rows;
  }
  if (thread == 0) {
    listed.count = 0;
    for (int w = 0; w < kNeurons / kLanes; ++w) listed.count += found[w];
  }
  __syncthreads();
}

/// Each lane's part of the product of a row of `up` and an input row.
template <class T>
__device__ __forceinline__ float multiply(const SparseProblem& p, const T* up, const T* input,
                                          int lane) {
  using V = Vector<T>;
  const int width = static_cast<int>(p.args.in_features);
  float sum = 0.0f;
#pragma unroll 4
  for (int column = lane * V::kElements; column < width; column += kLanes * V::kElements) {
    const V weights = load(up + column, p.wide_up);
    const V inputs = load(input + column, p.wide_input);
#pragma unroll
    for (int e = 0; e < V::kElements; ++e) {
      sum += simt::to_float(inputs.x[e]) * simt::to_float(weights.x[e]);
    }
  }
  return sum;
}

/// Fills `weight`: activation times product. Ends with a barrier.
template <class T>
__device__ void weigh(const SparseProblem& p, int64_t begin, Listed& listed) {
  const SparseRowFfnArgs& a = p.args;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int i = static_cast<int>(threadIdx.x) / kLanes; i < listed.count; i += kWarps) {
    const int64_t neuron = begin + listed.neuron[i];
    const T* up = static_cast<const T*>(a.up) + neuron * a.up_stride;
    for (int row = 0; row < a.rows; ++row) {
      if ((listed.rows[i] >> row & 1) == 0) continue;
      const T* input = static_cast<const T*>(a.input) + row * a.input_stride;
      const float product = sum_lanes(multiply<T>(p, up, input, lane));
      const T* own = static_cast<const T*>(a.activations) + row * a.activations_stride;
      if (lane == 0) listed.weight[i][row] = simt::to_float(own[neuron]) * product;
    }
  }
  __syncthreads();
}

/// Writes the sums of rows [first, first + kRows) at the columns of one vector.
template <class T, int kRows>
__device__ __forceinline__ void add_down(const SparseProblem& p, int64_t begin,
                                         const Listed& listed, int first, int column) {
  using V = Vector<T>;
  const SparseRowFfnArgs& a = p.args;
  const T* down = static_cast<const T*>(a.down) + begin * a.down_stride + column;
  const unsigned wanted = ((1u << kRows) - 1) << first;
  float sum[kRows][V::kElements] = {};
#pragma unroll 2
  for (int i = 0; i < listed.count; ++i) {
    if ((listed.rows[i] & wanted) == 0) continue;
    const V weights = load(down + listed.neuron[i] * a.down_stride, p.wide_down);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if ((listed.rows[i] >> (first + r) & 1) == 0) continue;
      const float weight = listed.weight[i][first + r];
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) sum[r][e] += weight * simt::to_float(weights.x[e]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= a.rows) continue;
    float* sums = p.sums + (blockIdx.x * a.rows + first + r) * a.out_features + column;
#pragma unroll
    for (int e = 0; e < V::kElements; ++e) sums[e] = sum[r][e];
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads)
    multiply_active(const __grid_constant__ SparseProblem p) {
  const SparseRowFfnArgs& a = p.args;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kNeurons;
  SHARED(Listed, listed);
  list_active<T>(a, begin, listed);
  weigh<T>(p, begin, listed);
  constexpr int kElements = Vector<T>::kElements;
  for (int first = 0; first < a.rows; first += kRows) {
    for (int column = static_cast<int>(threadIdx.x) * kElements; column < a.out_features;
         column += kThreads * kElements) {
      add_down<T, kRows>(p, begin, listed, first, column);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_parts(const __grid_constant__ SparseProblem p) {
  const SparseRowFfnArgs& a = p.args;
  const int64_t size = a.rows * a.out_features, parts = p.parts;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t part = 0; part < parts; ++part) sum += p.sums[part * size + i];
  if constexpr (std::is_same_v<T, float>) {
    static_cast<T*>(a.out)[i] = sum;
  } else {
    static_cast<T*>(a.out)[i] = simt::from_float<T>(sum);
  }
}

[[noreturn]] void refuse(const std::string& what, int64_t got) {
  throw std::invalid_argument("adaptive::sparse_row_ffn: " + what + ", got " + std::to_string(got));
}

bool on_boundary(const void* base, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 &&
         stride * element_bytes % kVectorBytes == 0;
}

template <class T>
void launch(const SparseRowFfnArgs& a, float* sums, Stream stream) {
  const SparseProblem p{a,
                        on_boundary(a.input, a.input_stride, sizeof(T)),
                        on_boundary(a.up, a.up_stride, sizeof(T)),
                        on_boundary(a.down, a.down_stride, sizeof(T)),
                        sums,
                        a.parts(kNeurons)};
  const dim3 parts(static_cast<unsigned>(p.parts));
  if (a.neurons > 0 && a.rows == 1) {
    simt::launch<multiply_active<T, 1>>("sparse_row_ffn", parts, dim3(kThreads), 0, stream, p);
  } else if (a.neurons > 0) {
    simt::launch<multiply_active<T, kTileRows>>("sparse_row_ffn", parts, dim3(kThreads), 0, stream,
                                                p);
  }
  const int64_t blocks = (a.rows * a.out_features + kThreads - 1) / kThreads;
  simt::launch<add_parts<T>>("sparse_row_ffn", dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                             0, stream, p);
}

}  // namespace

int64_t sparse_row_ffn_workspace_bytes(const SparseRowFfnArgs& args) {
  return args.parts(kNeurons) * args.rows * args.out_features * static_cast<int64_t>(sizeof(float));
}

void sparse_row_ffn(const SparseRowFfnArgs& args, void* workspace, int64_t workspace_bytes,
                    Stream stream) {
  if (args.rows == 0 || args.out_features == 0) return;
  if (args.rows > kMaxRows) refuse("activations must have at most 16 rows", args.rows);
  for (const int64_t features : {args.in_features, args.out_features}) {
    if (features % 8 || features > INT32_MAX / 2) {
      refuse("input and down must have a multiple of 8 features below 2^30", features);
    }
  }
  if (args.neurons > INT32_MAX) refuse("up must have fewer than 2^31 rows", args.neurons);
  const int64_t wanted = sparse_row_ffn_workspace_bytes(args);
  if (workspace_bytes < wanted) {
    refuse("workspace must have " + std::to_string(wanted) + " bytes", workspace_bytes);
  }
  float* sums = static_cast<float*>(workspace);
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(args, sums, stream);
    case DType::kFloat16: return launch<simt::float16>(args, sums, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(args, sums, stream);
    default: throw std::invalid_argument("adaptive::sparse_row_ffn: a dtype without kernel");
  }
}

}  // namespace adaptive::cuda
