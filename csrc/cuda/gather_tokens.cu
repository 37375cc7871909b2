// gather_tokens on CUDA: a block copies one row, 16 bytes to a thread.
//
// Elements are never looked at, so one kernel serves all types: zeros are zero bytes, and bytes of
// all ones are NaN in each of them.

#include "../gather_tokens.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kThreads = 128, kUnrolled = 2;

struct Gathering {
  GatherTokensArgs args;
  int64_t units;           // of a row
  int64_t unit_stride[2];  // of hidden: batch, token
};

template <class U>
__device__ __forceinline__ U filled(uint32_t bits) {
  if constexpr (sizeof(U) == kVectorBytes) {
    return {{bits, bits, bits, bits}};
  } else {
    return static_cast<U>(bits);
  }
}

/// `U`: 16 bytes, or 2 where rows do not start on 16-byte boundaries.
template <class U>
__global__ void __launch_bounds__(kThreads) gather_rows(const __grid_constant__ Gathering p) {
  const GatherTokensArgs& a = p.args;
  const int64_t entry = blockIdx.x, batch = entry / a.chosen;
  const int token = a.list[batch * a.list_stride + entry % a.chosen];
  U* out = static_cast<U*>(a.out) + entry * p.units;
  if (token < 0 || token >= a.tokens) {
    const U fill = filled<U>(token == -1 ? 0u : ~0u);
    for (int64_t i = threadIdx.x; i < p.units; i += kThreads) out[i] = fill;
    return;
  }
  const U* hidden = static_cast<const U*>(a.hidden) + batch * p.unit_stride[0] +
                    static_cast<int64_t>(token) * p.unit_stride[1];
  for (int64_t first = threadIdx.x; first < p.units; first += kThreads * kUnrolled) {
    U loaded[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int64_t i = first + u * kThreads;
      if (i < p.units) loaded[u] = hidden[i];
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int64_t i = first + u * kThreads;
      if (i < p.units) out[i] = loaded[u];
    }
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::gather_tokens: " + what);
}

template <class U>
void launch(Gathering p, int64_t unit_bytes, Stream stream) {
  const int64_t bytes = p.args.element_bytes(), rows = p.args.batch * p.args.chosen;
  if (rows > INT32_MAX) refuse("tokens must have fewer than 2^31 entries");
  p.units = p.args.width * bytes / unit_bytes;
  for (int axis = 0; axis < 2; ++axis) {
    p.unit_stride[axis] = p.args.hidden_stride[axis] * bytes / unit_bytes;
  }
  simt::launch<gather_rows<U>>("gather_tokens", dim3(static_cast<unsigned>(rows)), dim3(kThreads),
                               0, stream, p);
}

}  // namespace

void gather_tokens(const GatherTokensArgs& args, Stream stream) {
  if (args.batch == 0 || args.chosen == 0 || args.width == 0) return;
  const int64_t bytes = args.element_bytes();
  const bool wide = reinterpret_cast<uintptr_t>(args.hidden) % kVectorBytes == 0 &&
                    reinterpret_cast<uintptr_t>(args.out) % kVectorBytes == 0 &&
                    args.hidden_stride[0] * bytes % kVectorBytes == 0 &&
                    args.hidden_stride[1] * bytes % kVectorBytes == 0 &&
                    args.width * bytes % kVectorBytes == 0;
  const Gathering p{args, 0, {0, 0}};
  if (wide) return launch<Vector<uint32_t>>(p, kVectorBytes, stream);
  launch<uint16_t>(p, sizeof(uint16_t), stream);
}

}  // namespace adaptive::cuda
