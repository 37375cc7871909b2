// router_scores on CUDA: a block reads one token's hidden state once, 16 bytes to a thread.
//
// The router and the norm's weight are read beside it by every block, from the caches: of the
// device's memory bandwidth only the hidden states take part. Additions have one order.

#include "../router_scores.h"

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 4, kThreads = kWarps * kLanes;

struct Routing {
  RouterScoresArgs args;
  bool wide_hidden, wide_weight, wide_norm;  // rows start on 16-byte boundaries
};

template <class T>
__global__ void __launch_bounds__(kThreads) score_rows(const __grid_constant__ Routing p) {
  SHARED(float[kWarps], products);
  SHARED(float[kWarps], squares);
  constexpr int kElements = Vector<T>::kElements;
  const RouterScoresArgs& a = p.args;
  const int64_t token = blockIdx.x;
  const T* hidden = static_cast<const T*>(a.hidden) + token / a.tokens * a.hidden_stride[0] +
                    token % a.tokens * a.hidden_stride[1];
  const T* first = static_cast<const T*>(a.weight);
  const T* last = first + (a.routes - 1) * a.weight_stride;
  const T* norm = static_cast<const T*>(a.norm_weight);
  const int width = static_cast<int>(a.width);

  float product = 0.0f, square = 0.0f;
  for (int at = threadIdx.x * kElements; at < width; at += kThreads * kElements) {
    const Vector<T> x = load(hidden + at, p.wide_hidden);
    const Vector<T> chosen = load(last + at, p.wide_weight);
    const Vector<T> other = a.routes == 2 ? load(first + at, p.wide_weight) : Vector<T>{};
    const Vector<T> gain = norm ? load(norm + at, p.wide_norm) : Vector<T>{};
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float value = simt::to_float(x.x[e]);
      float weight = simt::to_float(chosen.x[e]);
      if (a.routes == 2) weight -= simt::to_float(other.x[e]);
      if (norm) weight *= simt::to_float(gain.x[e]);
      product += value * weight;
      square += value * value;
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    product += __shfl_xor_sync(~0u, product, lanes);
    square += __shfl_xor_sync(~0u, square, lanes);
  }
  if (threadIdx.x % kLanes == 0) {
    products[threadIdx.x / kLanes] = product;
    squares[threadIdx.x / kLanes] = square;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  product = square = 0.0f;
  for (int w = 0; w < kWarps; ++w) {
    product += products[w];
    square += squares[w];
  }
  if (norm) product /= sqrtf(square / static_cast<float>(width) + a.eps);
  a.scores[token] = a.sigmoid ? 1.0f / (1.0f + expf(-product)) : product;
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::router_scores: " + what);
}

bool on_boundary(const void* base, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 && stride_bytes % kVectorBytes == 0;
}

template <class T>
void launch(const RouterScoresArgs& args, Stream stream) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  const int64_t tokens = args.batch * args.tokens;
  if (tokens > INT32_MAX) refuse("hidden must have fewer than 2^31 tokens");
  const Routing p{args,
                  on_boundary(args.hidden, args.hidden_stride[0] * kBytes) &&
                      on_boundary(args.hidden, args.hidden_stride[1] * kBytes),
                  on_boundary(args.weight, args.weight_stride * kBytes),
                  on_boundary(args.norm_weight, 0)};
  simt::launch<score_rows<T>>("router_scores", dim3(static_cast<unsigned>(tokens)), dim3(kThreads),
                              0, stream, p);
}

}  // namespace

void router_scores(const RouterScoresArgs& args, Stream stream) {
  if (args.batch == 0 || args.tokens == 0) return;
  if (args.width % 8 || args.width > int64_t{1} << 30) {
    refuse("hidden must have a width that is a multiple of 8, got " + std::to_string(args.width));
  }
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(args, stream);
    case DType::kFloat16: return launch<simt::float16>(args, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(args, stream);
    default: refuse("hidden must be float32, float16 or bfloat16");
  }
}

}  // namespace adaptive::cuda
