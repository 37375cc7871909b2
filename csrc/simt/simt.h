// What every kernel includes instead of <cuda_runtime.h>. Under nvcc: thin names over CUDA. Under a
// plain C++ compiler: the same kernel source runs on the CPU, see simt_host.h. What a kernel must
// do for that: start through simt::launch, declare shared memory by SHARED or DYN_SHARED, and leave
// inline PTX to this file.

#pragma once

#if !defined(__CUDACC__)
#include "simt_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

/// SHARED(float[4][32], partial): a variable of the block.
#define SHARED(type, name) __shared__ std::type_identity_t<type> name

/// DYN_SHARED(float, tile): the block's dynamic shared memory, 128-byte aligned.
#define DYN_SHARED(type, name)                                   \
  extern __shared__ __align__(128) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)

namespace simt {

using Stream = cudaStream_t;
using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

/// Two values rounded to T in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

/// 2^x to about two units in the last place; 0 below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
  float made;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
  return made;
}

/// What the launch code asks of a device.
struct Device {
  int multiprocessors, shared_bytes_per_block, shared_bytes_per_multiprocessor;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a refused launch must not fail the caller's next one as well
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline constexpr int kMaxDevices = 64;

inline int current_device_index() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  if (index >= kMaxDevices) throw std::runtime_error("adaptive: too many CUDA devices");
  return index;
}

/// The current device; the driver is asked once per device and host thread.
inline const Device& current_device() {
  static thread_local Device devices[kMaxDevices];
  const int index = current_device_index();
  if (devices[index].multiprocessors == 0) {
    const auto ask = [index](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, index), "cudaDeviceGetAttribute");
      return value;
    };
    devices[index] = {ask(cudaDevAttrMultiProcessorCount),
                      ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
  return devices[index];
}

/// Enqueues kKernel(args...) and returns; throws if the launch is refused. May be captured.
template <auto kKernel, class... Args>
void launch(const char* op, dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            const Args&... args) {
  const auto check_launch = [op](cudaError_t error) {
    if (error == cudaSuccess) return;
    check(error, (std::string("adaptive::") + op + ": launch failed").c_str());
  };
  // Up to 48 KB need no leave. The driver is asked once per kernel, device and host thread; always
  // for all there is, since the setting is the kernel's and a smaller one would bind other threads.
  static thread_local bool allowed[kMaxDevices];
  bool& allowed_here = allowed[current_device_index()];
  if (shared_bytes > size_t{48 << 10} && !allowed_here) {
    const int bytes = current_device().shared_bytes_per_block;
    check_launch(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    check_launch(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
    allowed_here = true;
  }
  // clang-format off
  kKernel<<<grid, block, shared_bytes, stream>>>(args...);
  // clang-format on
  check_launch(cudaGetLastError());
}

/// Starts copying 16 aligned bytes to shared memory, or 16 zeros. Visible to the caller after
/// cp_async_wait, to other threads after a barrier that follows it.
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most the kPending latest groups are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// d += a * b for 16 x 16 times 16 x 8 elements of T. Lane 4g + t holds, two neighbours in k to a
/// register, rows g and g + 8 of a at k = 2t and 2t + 8, column g of b at the same k, and columns
/// 2t and 2t + 1 of rows g (d[0], d[1]) and g + 8 (d[2], d[3]).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Loads four 8 x 8 matrices of 2-byte elements from shared memory. `row` of lane i is row i % 8 of
/// matrix i / 8; to[m] of lane 4g + t is row g, columns 2t and 2t + 1 of matrix m (transposed: the
/// same of its transpose).
template <bool kTransposed = false>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}

}  // namespace simt

#endif  // __CUDACC__
