// sum_tokens on CUDA: one block for each KV head and 64 bytes of its rows.
//
// A block reads its columns of all chosen rows, 16 bytes to a thread, four rows in flight; a row of
// 256 bytes is read whole by four blocks. The order of additions follows from the list alone, so
// results are identical from call to call, and no workspace is needed.

#include "../sum_tokens.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kThreads = 512, kSliceThreads = 4;
constexpr int kRowsAtOnce = kThreads / kSliceThreads;
constexpr int kUnrolled = 4;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct SumProblem {
  SumTokensArgs args;
  int slices;  // of a row
  bool wide;   // rows start on 16-byte boundaries
};

template <class T>
__global__ void __launch_bounds__(kThreads) sum_rows(const __grid_constant__ SumProblem p) {
  using V = Vector<T>;
  const SumTokensArgs& a = p.args;
  unsigned rest = blockIdx.x;
  const int slice = rest % p.slices;
  rest /= p.slices;
  const int64_t kv_head = rest % static_cast<unsigned>(a.kv_heads);
  const int64_t batch = rest / static_cast<unsigned>(a.kv_heads);
  const int column =
      (slice * kSliceThreads + static_cast<int>(threadIdx.x) % kSliceThreads) * V::kElements;
  const int first = threadIdx.x / kSliceThreads;

  const int count = a.counts[batch * a.counts_stride[0] + kv_head * a.counts_stride[1]];
  const int32_t* list = a.indices + batch * a.indices_stride[0] + kv_head * a.indices_stride[1];
  const T* source = static_cast<const T*>(a.source) + batch * a.source_stride[0] +
                    kv_head * a.source_stride[1] + column;
  const bool exists = column < a.head_dim;
  const bool valid = count >= 0 && count <= a.chosen;
  const int end = valid ? count : 0;

  float sum[V::kElements] = {};
  bool bad = !valid;
  for (int i = first; i < end; i += kRowsAtOnce * kUnrolled) {
    V rows[kUnrolled];
    bool add[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int entry = i + u * kRowsAtOnce;
      add[u] = false;
      if (entry >= end) continue;
      const int token = list[entry], previous = entry > 0 ? list[entry - 1] : -1;
      if (token < 0 || token >= a.capacity || token <= previous) {
        bad = true;
      } else if (exists) {
        rows[u] = load(source + token * a.source_stride[2], p.wide);
        add[u] = true;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      if (!add[u]) continue;
#pragma unroll
      for (int e = 0; e < V::kElements; ++e) sum[e] += simt::to_float(rows[u].x[e]);
    }
  }

  SHARED(float[kRowsAtOnce][kSliceThreads * V::kElements + 1], sums);
  SHARED(int, failed);
  if (threadIdx.x == 0) failed = 0;
  __syncthreads();
  if (bad) failed = 1;
#pragma unroll
  for (int e = 0; e < V::kElements; ++e) {
    sums[first][static_cast<int>(threadIdx.x) % kSliceThreads * V::kElements + e] = sum[e];
  }
  for (int half = kRowsAtOnce / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < half * kSliceThreads * V::kElements; i += kThreads) {
      const int row = i / (kSliceThreads * V::kElements), c = i % (kSliceThreads * V::kElements);
      sums[row][c] += sums[row + half][c];
    }
  }
  __syncthreads();
  const int c = slice * kSliceThreads * V::kElements + static_cast<int>(threadIdx.x);
  if (static_cast<int>(threadIdx.x) < kSliceThreads * V::kElements && c < a.head_dim) {
    a.sums[(batch * a.kv_heads + kv_head) * a.head_dim + c] = failed ? kNaN : sums[0][threadIdx.x];
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::sum_tokens: " + what);
}

template <class T>
void launch(SumProblem p, Stream stream) {
  const SumTokensArgs& a = p.args;
  const int64_t element_bytes = sizeof(T), slice = kSliceThreads * Vector<T>::kElements;
  p.slices = static_cast<int>((a.head_dim + slice - 1) / slice);
  p.wide = reinterpret_cast<uintptr_t>(a.source) % kVectorBytes == 0;
  for (const int64_t stride : a.source_stride) {
    p.wide = p.wide && stride * element_bytes % kVectorBytes == 0;
  }
  const int64_t blocks = a.batch * a.kv_heads * p.slices;
  if (blocks > INT32_MAX) refuse("batch must be smaller: too many thread blocks");
  simt::launch<sum_rows<T>>("sum_tokens", dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                            stream, p);
}

}  // namespace

void sum_tokens(const SumTokensArgs& args, Stream stream) {
  if (args.batch == 0 || args.kv_heads == 0 || args.head_dim == 0) return;
  if (args.head_dim % 8) {
    refuse("head_dim must be a multiple of 8, got " + std::to_string(args.head_dim));
  }
  const SumProblem p{args, 0, false};
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(p, stream);
    case DType::kFloat16: return launch<simt::float16>(p, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(p, stream);
    default: refuse("source must be float32, float16 or bfloat16");
  }
}

}  // namespace adaptive::cuda
