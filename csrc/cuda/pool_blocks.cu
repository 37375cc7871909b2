// pool_blocks on CUDA: one thread block for each block of tokens of a head.
//
// A row takes as many threads as it has 16-byte pieces; the rest of the thread block takes further
// rows at the same time, four loads of a thread in flight. Partial sums meet in shared memory in a
// fixed order, so results are identical from call to call, and no workspace is needed.

#include "../pool_blocks.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;
constexpr int kMaxHeadDim = 256;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct PoolProblem {
  PoolBlocksArgs args;
  int64_t blocks;
  int pieces;  // of a row, each a thread's load
  bool wide;   // rows start on 16-byte boundaries
};

template <class T>
__global__ void __launch_bounds__(kThreads) pool_rows(const __grid_constant__ PoolProblem p) {
  using V = Vector<T>;
  const PoolBlocksArgs& a = p.args;
  const auto blocks = static_cast<unsigned>(p.blocks);
  const auto heads = static_cast<unsigned>(a.heads);
  const int64_t block = blockIdx.x % blocks;
  const int64_t head = blockIdx.x / blocks % heads, batch = blockIdx.x / blocks / heads;
  int64_t low = 0, high = a.tokens;
  if (a.offsets != nullptr) {
    const int32_t* cuts = a.offsets + batch * a.offsets_stride;
    low = cuts[0];
    high = cuts[a.cuts - 1];
  }
  const bool valid = low >= 0 && low <= high && high <= a.tokens;
  const int64_t first = block * a.block_size;
  const int64_t begin = first > low ? first : low;
  const int64_t end = first + a.block_size < high ? first + a.block_size : high;
  const int64_t tokens = valid && end > begin ? end - begin : 0;

  const int rows = kThreads / p.pieces;  // read at the same time
  const int row = static_cast<int>(threadIdx.x) / p.pieces;
  const int column = static_cast<int>(threadIdx.x) % p.pieces * V::kElements;
  const T* source = static_cast<const T*>(a.source) + batch * a.source_stride[0] +
                    head * a.source_stride[1] + begin * a.source_stride[2] + column;
  float sum[V::kElements] = {};
  for (int64_t token = row; row < rows && token < tokens; token += rows * kInFlight) {
    V loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t next = token + i * rows;
      if (next < tokens) loaded[i] = load(source + next * a.source_stride[2], p.wide);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (token + i * rows >= tokens) continue;
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) sum[e] += simt::to_float(loaded[i].x[e]);
    }
  }

  SHARED(float[kThreads][V::kElements + 1], sums);
#pragma unroll
  for (int e = 0; e < V::kElements; ++e) sums[threadIdx.x][e] = sum[e];
  __syncthreads();
  const float count = tokens > 0 ? static_cast<float>(tokens) : 1.0f;
  float* means = a.means + ((batch * a.heads + head) * p.blocks + block) * a.head_dim;
  for (int d = static_cast<int>(threadIdx.x); d < a.head_dim; d += kThreads) {
    float total = 0.0f;
    for (int r = 0; r < rows; ++r) {
      total += sums[r * p.pieces + d / V::kElements][d % V::kElements];
    }
    means[d] = valid ? total / count : kNaN;
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::pool_blocks: " + what);
}

template <class T>
void launch(PoolProblem p, Stream stream) {
  const PoolBlocksArgs& a = p.args;
  const int64_t element_bytes = sizeof(T);
  p.pieces = static_cast<int>(a.head_dim / Vector<T>::kElements);
  p.wide = reinterpret_cast<uintptr_t>(a.source) % kVectorBytes == 0;
  for (const int64_t stride : a.source_stride) {
    p.wide = p.wide && stride * element_bytes % kVectorBytes == 0;
  }
  const int64_t thread_blocks = a.batch * a.heads * p.blocks;
  if (thread_blocks > INT32_MAX) refuse("source must be smaller: too many thread blocks");
  simt::launch<pool_rows<T>>("pool_blocks", dim3(static_cast<unsigned>(thread_blocks)),
                             dim3(kThreads), 0, stream, p);
}

}  // namespace

void pool_blocks(const PoolBlocksArgs& args, Stream stream) {
  if (args.batch == 0 || args.heads == 0 || args.tokens == 0) return;
  if (args.head_dim % 8 || args.head_dim > kMaxHeadDim) {
    refuse("head_dim must be a multiple of 8 up to 256, got " + std::to_string(args.head_dim));
  }
  const PoolProblem p{args, args.blocks(), 0, false};
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(p, stream);
    case DType::kFloat16: return launch<simt::float16>(p, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(p, stream);
    default: refuse("source must be float32, float16 or bfloat16");
  }
}

}  // namespace adaptive::cuda
