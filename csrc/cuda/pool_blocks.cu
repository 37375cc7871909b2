// pool_blocks on CUDA: one thread block for each block of tokens of a head.
//
// Neighbouring threads read 16 bytes each of a row, and each of them several rows at once; the
// rows' threads are then added up in one order, so that results are the same from call to call.

#include "../pool_blocks.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kThreads = 128, kUnrolled = 4;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct PoolProblem {
  PoolBlocksArgs args;
  int64_t blocks;
  bool wide;  // rows start on 16-byte boundaries
};

template <class T>
__global__ void __launch_bounds__(kThreads) pool_rows(const __grid_constant__ PoolProblem p) {
  using V = Vector<T>;
  const PoolBlocksArgs& a = p.args;
  const int64_t mean = blockIdx.x, head = mean / p.blocks, batch = head / a.heads;
  const int64_t block = mean - head * p.blocks;
  int64_t first = 0, last = a.tokens;
  if (a.offsets) {
    const int32_t* cuts = a.offsets + batch * a.offsets_stride;
    first = cuts[0];
    last = cuts[a.cuts - 1];
  }
  const bool good = first >= 0 && first <= last && last <= a.tokens;
  const int64_t begin = max(first, block * a.block_size);
  const int64_t end = good ? min(last, (block + 1) * a.block_size) : 0;

  const int vectors = static_cast<int>(a.head_dim) / V::kElements;
  const int rows = kThreads / vectors;  // that are read side by side
  const int row = threadIdx.x / vectors, column = threadIdx.x % vectors * V::kElements;
  const T* source = static_cast<const T*>(a.source) + batch * a.source_stride[0] +
                    (head - batch * a.heads) * a.source_stride[1] + column;
  float sum[V::kElements] = {};
  for (int64_t t = begin + row; row < rows && t < end; t += rows * kUnrolled) {
    V x[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int64_t token = t + u * rows;
      if (token < end) x[u] = load(source + token * a.source_stride[2], p.wide);
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      if (t + u * rows >= end) break;
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) sum[e] += simt::to_float(x[u].x[e]);
    }
  }

  SHARED(float[kThreads * V::kElements], sums);  // [rows, head_dim]
#pragma unroll
  for (int e = 0; e < V::kElements; ++e) {
    if (row < rows) sums[row * static_cast<int>(a.head_dim) + column + e] = sum[e];
  }
  __syncthreads();
  const float count = static_cast<float>(max(end - begin, int64_t{1}));
  for (int c = threadIdx.x; c < a.head_dim; c += kThreads) {
    float total = 0.0f;
    for (int r = 0; r < rows; ++r) total += sums[r * static_cast<int>(a.head_dim) + c];
    a.means[mean * a.head_dim + c] = good ? total / count : kNaN;
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::pool_blocks: " + what);
}

template <class T>
void launch(PoolProblem p, Stream stream) {
  const PoolBlocksArgs& a = p.args;
  p.wide = reinterpret_cast<uintptr_t>(a.source) % kVectorBytes == 0;
  for (const int64_t stride : a.source_stride) {
    p.wide = p.wide && stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
  }
  const int64_t means = a.batch * a.heads * p.blocks;
  if (means > INT32_MAX) refuse("batch must be smaller: too many thread blocks");
  simt::launch<pool_rows<T>>("pool_blocks", dim3(static_cast<unsigned>(means)), dim3(kThreads), 0,
                             stream, p);
}

}  // namespace

void pool_blocks(const PoolBlocksArgs& args, Stream stream) {
  if (args.batch == 0 || args.heads == 0 || args.tokens == 0) return;
  if (args.head_dim < 8 || args.head_dim > 256 || args.head_dim % 8) {
    refuse("head_dim must be a multiple of 8 up to 256, got " + std::to_string(args.head_dim));
  }
  const PoolProblem p{args, args.blocks(), false};
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(p, stream);
    case DType::kFloat16: return launch<simt::float16>(p, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(p, stream);
    default: refuse("source must be float32, float16 or bfloat16");
  }
}

}  // namespace adaptive::cuda
