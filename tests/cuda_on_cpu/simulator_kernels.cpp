// Tiny kernels for test_simulator.py: what the simulator must run right, and bugs it must catch.

#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>

#include "simt/simt.h"

namespace {

constexpr unsigned kAll = ~0u;

template <bool kBarrier>
__global__ void reverse(const float* in, float* out) {
  SHARED(float[64], tile);
  tile[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool kBarrier>
__global__ void reverse_lanes(const float* in, float* out) {
  DYN_SHARED(float, tile);
  tile[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

template <int kPending>
__global__ void copy(const float* in, float* out) {
  DYN_SHARED(float, tile);
  simt::cp_async16(tile + threadIdx.x * 4, in + threadIdx.x * 4);
  simt::cp_async_commit();
  simt::cp_async_wait<kPending>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = tile[threadIdx.x * 4 + i];
  simt::cp_async_wait<0>();
}

__global__ void copy_unaligned(const float* in, float*) {
  DYN_SHARED(float, tile);
  simt::cp_async16(tile, in + 1);
}

__global__ void copy_in_flight(const float* in, float*) {
  DYN_SHARED(float, tile);
  simt::cp_async16(tile + threadIdx.x * 4, in + threadIdx.x * 4);
  simt::cp_async_commit();
}

__global__ void copy_nothing(const float* in, float* out) {
  DYN_SHARED(float, tile);
  simt::cp_async16(tile, in, threadIdx.x < 0);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x % 4];
}

__global__ void sum_lanes(const float* in, float* out) {
  float x = in[threadIdx.x];
  for (int lanes = 1; lanes < 32; lanes *= 2) x += __shfl_xor_sync(kAll, x, lanes);
  out[threadIdx.x] = x;
}

__global__ void broadcast(const float* in, float* out) {
  out[threadIdx.x] = __shfl_sync(kAll, in[threadIdx.x], 5);
}

// Disjoint parts of a warp may meet on their own, in any order.
__global__ void halves(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    for (int i = 1; i < 16; i *= 2) x += __shfl_xor_sync(0x0000ffffu, x, i);
  } else {
    x = __shfl_sync(0xffff0000u, x, 31);
  }
  __syncwarp();
  out[threadIdx.x] = x;
}

__global__ void vote(const float* in, float* out) {
  out[threadIdx.x] = float(__ballot_sync(kAll, in[threadIdx.x] > 0.0f) & 0xffffu);
}

__global__ void shuffle_from_outside(const float* in, float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, in[threadIdx.x], 20);
}

__global__ void shuffle_without_others(const float* in, float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
}

__global__ void shuffle_outside_mask(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 1);
}

__global__ void diverged(const float* in, float* out) {
  if (threadIdx.x % 2) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, in[threadIdx.x], 1);
  } else {
    __syncwarp();
  }
}

__global__ void two_barriers(const float*, float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void early_return(const float*, float*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

// Static shared memory belongs to one block: what block 0 wrote is gone in block 1.
__global__ void leftovers(const float* in, float* out) {
  SHARED(float[64], tile);
  if (blockIdx.x == 0) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

// out[thread of the grid] = a number made of all coordinates.
__global__ void coordinates(const float*, float* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = float(
      threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x + 10000 * blockIdx.y);
}

// out [16, 8] = in[0:256] as [16, 16] times in[256:384] as [16, 8], through both ldmatrix forms.
template <class T>
__global__ void multiply(const float* in, float* out) {
  SHARED(T[16][16], a);
  SHARED(T[16][16], b);
  for (int i = threadIdx.x; i < 256; i += 32) {
    a[i / 16][i % 16] = simt::from_float<T>(in[i]);
    b[i / 16][i % 16] = simt::from_float<T>(i % 16 < 8 ? in[256 + i / 16 * 8 + i % 16] : 0.0f);
  }
  __syncwarp();
  const int lane = threadIdx.x, row = lane % 16, column = lane / 16 * 8;
  uint32_t left[4], right[4];
  simt::ldmatrix_x4(left, &a[row][column]);
  simt::ldmatrix_x4<true>(right, &b[row][column]);
  float d[4] = {};
  simt::mma_m16n8k16<T>(d, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <auto kKernel>
auto start(dim3 grid, dim3 block, size_t shared_bytes) {
  return [=](const float* in, float* out) {
    simt::launch<kKernel>("test", grid, block, shared_bytes, nullptr, in, out);
  };
}

const std::map<std::string, std::function<void(const float*, float*)>> kKernels = {
    {"reverse", start<reverse<true>>(1, 64, 0)},
    {"reverse without __syncthreads", start<reverse<false>>(1, 64, 0)},
    {"reverse_lanes", start<reverse_lanes<true>>(1, 64, 256)},
    {"reverse_lanes without __syncwarp", start<reverse_lanes<false>>(1, 64, 256)},
    {"copy", start<copy<0>>(1, 16, 256)},
    {"copy that waits for too few", start<copy<1>>(1, 16, 256)},
    {"copy_unaligned", start<copy_unaligned>(1, 16, 256)},
    {"copy_in_flight", start<copy_in_flight>(1, 16, 256)},
    {"copy beyond shared memory", start<copy<0>>(1, 16, 128)},
    {"copy_nothing", start<copy_nothing>(1, 64, 16)},
    {"sum_lanes", start<sum_lanes>(1, 64, 0)},
    {"broadcast", start<broadcast>(1, 64, 0)},
    {"halves", start<halves>(1, 64, 0)},
    {"vote", start<vote>(1, 64, 0)},
    {"shuffle_from_outside", start<shuffle_from_outside>(1, 32, 0)},
    {"shuffle_without_others", start<shuffle_without_others>(1, 64, 0)},
    {"shuffle_outside_mask", start<shuffle_outside_mask>(1, 32, 0)},
    {"diverged", start<diverged>(1, 32, 0)},
    {"two_barriers", start<two_barriers>(1, 64, 0)},
    {"early_return", start<early_return>(1, 64, 0)},
    {"leftovers", start<leftovers>(2, 64, 0)},
    {"coordinates", start<coordinates>(dim3(2, 3), dim3(4, 2, 2), 0)},
    {"multiply bfloat16", start<multiply<simt::bfloat16>>(1, 32, 0)},
    {"multiply float16", start<multiply<simt::float16>>(1, 32, 0)},
    {"half a warp multiplies", start<multiply<simt::float16>>(1, 16, 0)},
    {"too much shared memory", start<reverse<true>>(1, 64, 1 << 20)},
    {"too many threads", start<reverse<true>>(1, 2048, 0)},
    {"no blocks", start<reverse<true>>(0, 64, 0)},
};

}  // namespace

extern "C" {

void set_seed(unsigned seed) { simt::host::seed() = seed; }

unsigned get_seed() { return simt::host::seed(); }

/// Returns 0, or 1 and the message of the exception.
int run(const char* kernel, const float* in, float* out, char* error, int64_t error_bytes) {
  try {
    kKernels.at(kernel)(in, out);
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
}

}  // extern "C"
