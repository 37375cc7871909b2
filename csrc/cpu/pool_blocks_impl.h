// pool_blocks' kernel, one template on a SIMD trait and an element type.

#pragma once

#include "cpu/pool_blocks_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

// The mean of consecutive tokens, up to U units of columns at a time.
template <class S, class E>
class PoolItemKernel {
 public:
  PoolItemKernel(const PoolBlocksArgs& args, const PoolItem& item)
      : tokens_(item.end - item.begin),
        head_dim_(static_cast<int>(args.head_dim)),
        source_(static_cast<const E*>(args.source) + item.batch * args.source_stride[0] +
                item.head * args.source_stride[1] + item.begin * args.source_stride[2]),
        stride_(args.source_stride[2]),
        mean_(item.mean) {}

  void run() const {
    int column = 0;
    for (; column + 4 * kUnit <= head_dim_; column += 4 * kUnit) pool<4, false>(column);
    for (; column + kUnit <= head_dim_; column += kUnit) pool<1, false>(column);
    if (column < head_dim_) pool<1, true>(column);
  }

 private:
  using Vec = typename S::Vec;
  static constexpr int kUnit = 2 * S::kWidth;  // elements of one load_pair
  static constexpr int kAhead = 16;            // tokens

  template <int U, bool kTail>
  void pool(int column) const {
    const int tail = head_dim_ % kUnit;
    Vec sums[2 * U];
#pragma GCC unroll 8
    for (int u = 0; u < 2 * U; ++u) sums[u] = S::zero();
    const E* from = source_ + column;
    for (int64_t i = 0; i < tokens_; ++i, from += stride_) {
      // Queries and keys come as [tokens, heads, head_dim]: a head's next token is far away.
      if (i + kAhead < tokens_) prefetch<U * kUnit>(from + kAhead * stride_);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        Vec low, high;
        if constexpr (kTail) {
          S::load_pair_tail(from, tail, low, high);
        } else {
          S::load_pair(from + u * kUnit, low, high);
        }
        sums[2 * u] = S::add(sums[2 * u], low);
        sums[2 * u + 1] = S::add(sums[2 * u + 1], high);
      }
    }
    const Vec count = S::set1(tokens_ > 0 ? static_cast<float>(tokens_) : 1.0f);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      float lanes[kUnit];
      store_unit<S, E>(S::div(sums[2 * u], count), S::div(sums[2 * u + 1], count), lanes);
      __builtin_memcpy(mean_ + column + u * kUnit, lanes, (kTail ? tail : kUnit) * sizeof(float));
    }
  }

  const int64_t tokens_;
  const int head_dim_;
  const E* const source_;
  const int64_t stride_;
  float* const mean_;
};

template <class S>
void pool_item(const PoolBlocksArgs& args, const PoolItem& item) {
  switch (args.dtype) {
    case DType::kFloat32: return PoolItemKernel<S, Float32>(args, item).run();
    case DType::kFloat16: return PoolItemKernel<S, Float16>(args, item).run();
    default: return PoolItemKernel<S, Bfloat16>(args, item).run();
  }
}

}  // namespace
}  // namespace adaptive::cpu
