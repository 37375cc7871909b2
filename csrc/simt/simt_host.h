// The CPU side of simt.h: the CUDA names that kernels use, and launch, over the blocks of block.h.
//
// What it finds that a run on a GPU does not tell: shared memory read before it was written (NaN),
// cp.async read before it was waited for (NaN), a missing barrier (NaN or a wrong result under some
// seed), lanes or threads that do not meet (an error with both source lines), a kernel that returns
// with copies in flight, and, under the address sanitizer, every access out of bounds. What it
// cannot find: races between blocks, bank conflicts, occupancy, and whatever nvcc makes of the
// source.

#pragma once

#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "atomic.h"
#include "block.h"
#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define SHARED(type, name)                                \
  static const char name##_declaration = 0;               \
  auto& name = *static_cast<std::type_identity_t<type>*>( \
      ::simt::host::current_block->shared.variable(&name##_declaration, sizeof(type)))
#define DYN_SHARED(type, name) \
  type* const name = static_cast<type*>(::simt::host::current_block->shared.dynamic())

#define threadIdx (::simt::host::current_block->thread().index)
#define blockIdx (::simt::host::current_block->index)
#define blockDim (::simt::host::current_block->size)
#define gridDim (::simt::host::current_block->grid)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline float __expf(float x) { return std::exp(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

namespace simt {

using Stream = void*;

inline float exp2_approx(float x) { return std::exp2(x); }

/// What the launch code asks of a device. Tests may change it through host::device().
struct Device {
  int multiprocessors, shared_bytes_per_block, shared_bytes_per_multiprocessor;
};

namespace host {

inline Device& device() {
  static Device device = {4, 227 << 10, 228 << 10};
  return device;
}

inline unsigned& seed() {
  static unsigned seed = [] {
    const char* text = std::getenv("ADAPTIVE_SIMT_SEED");
    return text ? unsigned(std::atoi(text)) : 0u;
  }();
  return seed;
}

}  // namespace host

inline const Device& current_device() { return host::device(); }

/// Runs the whole grid before it returns: blocks in parallel under OpenMP, on any stream.
template <auto kKernel, class... Args>
void launch(const char* op, dim3 grid, dim3 block, std::size_t shared_bytes, Stream, Args... args) {
  const auto refuse = [op](const std::string& why) {
    throw std::runtime_error(std::string("adaptive::") + op + ": launch failed: " + why);
  };
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  const unsigned threads = block.x * block.y * block.z;
  if (blocks == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) refuse("grid size");
  if (threads == 0 || threads > 1024) refuse("block size");
  if (shared_bytes > std::size_t(host::device().shared_bytes_per_block)) refuse("shared memory");

  auto kernel = [&] { kKernel(args...); };
  const auto call = [](void* k) { (*static_cast<decltype(kernel)*>(k))(); };
  std::string error;
#pragma omp parallel
  {
    host::Block simulated(grid, block, shared_bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const uint3 index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                           unsigned(i / grid.x / grid.y)};
      const std::string failure = simulated.run(index, call, &kernel, host::seed());
      if (failure.empty()) continue;
#pragma omp critical
      error = failure + " in block (" + std::to_string(index.x) + "," + std::to_string(index.y) +
              "," + std::to_string(index.z) + ")";
    }
  }
  if (!error.empty()) refuse(error);
}

/// The destination is NaN until the copy's group has been waited for.
inline void cp_async16(void* to, const void* from, bool valid = true,
                       host::Where at = host::Where::current()) {
  host::Block& block = *host::current_block;
  if (reinterpret_cast<uintptr_t>(to) % 16 || !block.shared.contains(to, 16)) {
    throw std::runtime_error(
        "cp_async16: the destination must be 16 aligned bytes of shared memory");
  }
  if (valid && reinterpret_cast<uintptr_t>(from) % 16) {
    throw std::runtime_error("cp_async16: the source must be aligned to 16 bytes");
  }
  host::Copy copy{to, {}, block.thread().copy_group, at};
  if (valid) std::memcpy(copy.bytes, from, 16);
  std::memset(to, host::kPoison, 16);
  block.thread().copies.push_back(copy);
}
inline void cp_async_commit() { ++host::current_block->thread().copy_group; }
template <int kPending>
void cp_async_wait() {
  host::current_block->thread().land_copies(kPending);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  host::Where at = host::Where::current()) {
  host::Product<T> mine{&d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  host::current_block->meet(~0u, &mine, &host::Product<T>::run, "mma_m16n8k16", at);
}

template <bool kTransposed = false>
void ldmatrix_x4(uint32_t (&to)[4], const void* row, host::Where at = host::Where::current()) {
  host::Tiles<kTransposed> mine{{}, to};
  if (reinterpret_cast<uintptr_t>(row) % 16)
    throw std::runtime_error("ldmatrix_x4: misaligned row");
  std::memcpy(mine.row, row, sizeof mine.row);
  host::current_block->meet(~0u, &mine, &host::Tiles<kTransposed>::run, "ldmatrix_x4", at);
}

}  // namespace simt

inline void __syncthreads(simt::host::Where at = simt::host::Where::current()) {
  simt::host::current_block->barrier("__syncthreads", at);
}
inline void __syncwarp(unsigned mask = ~0u, simt::host::Where at = simt::host::Where::current()) {
  simt::host::exchange(mask, 0, simt::host::current_block->thread().lane, "__syncwarp", at);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source,
              simt::host::Where at = simt::host::Where::current()) {
  return simt::host::exchange(mask, value, source & 31, "__shfl_sync", at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other,
                  simt::host::Where at = simt::host::Where::current()) {
  const int lane = simt::host::current_block->thread().lane;
  return simt::host::exchange(mask, value, lane ^ other, "__shfl_xor_sync", at);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate,
                              simt::host::Where at = simt::host::Where::current()) {
  simt::host::Vote mine{predicate, 0};
  const auto run = [](void* const(&lanes)[simt::host::kWarpLanes]) {
    unsigned votes = 0;
    for (int i = 0; i < simt::host::kWarpLanes; ++i) {
      if (lanes[i] && static_cast<simt::host::Vote*>(lanes[i])->predicate) votes |= 1u << i;
    }
    for (void* lane : lanes) {
      if (lane) static_cast<simt::host::Vote*>(lane)->result = votes;
    }
  };
  simt::host::current_block->meet(mask, &mine, run, "__ballot_sync", at);
  return mine.result;
}
