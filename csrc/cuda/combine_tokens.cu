// combine_tokens on CUDA: a block for each listed row, 16 bytes to a thread.
//
// Where the result is not hidden itself, hidden is copied first, by a launch of its own: which rows
// the list leaves out is known to no block. Listed rows are distinct, so no two blocks meet.

#include "../combine_tokens.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"
#include "vector.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kThreads = 128;

struct Combination {
  CombineTokensArgs args;
  bool wide;  // rows start on 16-byte boundaries and are whole vectors
};

template <class T>
__device__ __forceinline__ T rounded(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    return simt::from_float<T>(x);
  }
}

template <class T>
__device__ __forceinline__ const T* hidden_row(const CombineTokensArgs& a, int64_t batch,
                                               int64_t token) {
  return static_cast<const T*>(a.hidden) + batch * a.hidden_stride[0] + token * a.hidden_stride[1];
}

template <class T>
__device__ __forceinline__ T* out_row(const CombineTokensArgs& a, int64_t batch, int64_t token) {
  return static_cast<T*>(a.out) + batch * a.out_stride[0] + token * a.out_stride[1];
}

template <class T>
__global__ void __launch_bounds__(kThreads) copy_rows(const __grid_constant__ Combination p) {
  const CombineTokensArgs& a = p.args;
  const int64_t row = blockIdx.x;
  const T* from = hidden_row<T>(a, row / a.tokens, row % a.tokens);
  T* to = out_row<T>(a, row / a.tokens, row % a.tokens);
  if (!p.wide) {
    for (int64_t i = threadIdx.x; i < a.width; i += kThreads) to[i] = from[i];
    return;
  }
  constexpr int kElements = Vector<T>::kElements;
  for (int64_t i = threadIdx.x * kElements; i < a.width; i += kThreads * kElements) {
    *reinterpret_cast<Vector<T>*>(to + i) = load(from + i, true);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) add_rows(const __grid_constant__ Combination p) {
  const CombineTokensArgs& a = p.args;
  const int64_t batch = blockIdx.x / a.chosen, entry = blockIdx.x % a.chosen;
  const int token = a.list[batch * a.list_stride + entry];
  if (token < 0 || token >= a.tokens) return;
  const float weight = a.weights ? a.weights[batch * a.weights_stride + entry] : 1.0f;
  const T* update =
      static_cast<const T*>(a.update) + batch * a.update_stride[0] + entry * a.update_stride[1];
  const T* hidden = hidden_row<T>(a, batch, token);
  T* out = out_row<T>(a, batch, token);
  const auto sum = [weight](T own, T added) {
    return rounded<T>(simt::to_float(own) + weight * simt::to_float(added));
  };
  if (!p.wide) {
    for (int64_t i = threadIdx.x; i < a.width; i += kThreads) out[i] = sum(hidden[i], update[i]);
    return;
  }
  constexpr int kElements = Vector<T>::kElements;
  for (int64_t i = threadIdx.x * kElements; i < a.width; i += kThreads * kElements) {
    Vector<T> own = load(hidden + i, true);
    const Vector<T> added = load(update + i, true);
#pragma unroll
    for (int e = 0; e < kElements; ++e) own.x[e] = sum(own.x[e], added.x[e]);
    *reinterpret_cast<Vector<T>*>(out + i) = own;
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::combine_tokens: " + what);
}

template <class T>
void launch(const Combination& p, Stream stream) {
  const CombineTokensArgs& a = p.args;
  const int64_t rows = a.batch * a.tokens, entries = a.batch * a.chosen;
  if (rows > INT32_MAX || entries > INT32_MAX) refuse("hidden must have fewer than 2^31 rows");
  if (!a.in_place()) {
    simt::launch<copy_rows<T>>("combine_tokens", dim3(static_cast<unsigned>(rows)), dim3(kThreads),
                               0, stream, p);
  }
  if (entries == 0) return;
  simt::launch<add_rows<T>>("combine_tokens", dim3(static_cast<unsigned>(entries)), dim3(kThreads),
                            0, stream, p);
}

}  // namespace

void combine_tokens(const CombineTokensArgs& args, Stream stream) {
  if (args.batch == 0 || args.tokens == 0 || args.width == 0) return;
  const int64_t bytes = args.element_bytes();
  bool wide = args.width * bytes % kVectorBytes == 0;
  for (const void* base : {args.hidden, static_cast<const void*>(args.out), args.update}) {
    wide = wide && reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0;
  }
  for (int axis = 0; axis < 2; ++axis) {
    for (const int64_t stride :
         {args.hidden_stride[axis], args.out_stride[axis], args.update_stride[axis]}) {
      wide = wide && stride * bytes % kVectorBytes == 0;
    }
  }
  const Combination p{args, wide};
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(p, stream);
    case DType::kFloat16: return launch<simt::float16>(p, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(p, stream);
    default: refuse("hidden must be float32, float16 or bfloat16");
  }
}

}  // namespace adaptive::cuda
