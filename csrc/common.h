// What every native file may use: element types and the stream handle. Knows nothing of tensors.

#pragma once

#include <cstdint>

// The type behind cudaStream_t, spelled here so that CPU builds need no CUDA headers.
struct CUstream_st;

namespace adaptive {

using Stream = CUstream_st*;

enum class DType : int32_t { kFloat32, kFloat16, kBfloat16, kBool, kInt32, kInt64, kInt8 };

}  // namespace adaptive
