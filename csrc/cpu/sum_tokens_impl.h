// sum_tokens' kernel, one template on a SIMD trait and an element type.

#pragma once

#include "cpu/decode_attention_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

// Adds up tokens [begin, end) of a list, up to U units of columns at a time.
template <class S, class E>
class SumItemKernel {
 public:
  SumItemKernel(const SumTokensArgs& args, const SumItem& item)
      : item_(item),
        head_dim_(static_cast<int>(args.head_dim)),
        tokens_(args.indices + item.batch * args.indices_stride[0] +
                item.kv_head * args.indices_stride[1]),
        source_(static_cast<const E*>(args.source) + item.batch * args.source_stride[0] +
                item.kv_head * args.source_stride[1]),
        stride_(args.source_stride[2]) {}

  void run() const {
    int column = 0;
    for (; column + 4 * kUnit <= head_dim_; column += 4 * kUnit) sum<4, false>(column);
    for (; column + kUnit <= head_dim_; column += kUnit) sum<1, false>(column);
    if (column < head_dim_) sum<1, true>(column);
  }

 private:
  using Vec = typename S::Vec;
  static constexpr int kUnit = 2 * S::kWidth;  // elements of one load_pair
  static constexpr int kAhead = 16;            // tokens

  template <int U, bool kTail>
  void sum(int column) const {
    const int tail = head_dim_ % kUnit;
    Vec sums[2 * U];
#pragma GCC unroll 8
    for (int u = 0; u < 2 * U; ++u) sums[u] = S::zero();
    for (int64_t i = item_.begin; i < item_.end; ++i) {
      const int64_t ahead = i + kAhead < item_.end ? i + kAhead : i;
      prefetch<U * kUnit>(source_ + tokens_[ahead] * stride_ + column);
      const E* from = source_ + tokens_[i] * stride_ + column;
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
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      float lanes[kUnit];
      store_unit<S, E>(sums[2 * u], sums[2 * u + 1], lanes);
      __builtin_memcpy(item_.sums + column + u * kUnit, lanes,
                       (kTail ? tail : kUnit) * sizeof(float));
    }
  }

  const SumItem& item_;
  const int head_dim_;
  const int32_t* const tokens_;
  const E* const source_;
  const int64_t stride_;
};

template <class S>
void sum_item(const SumTokensArgs& args, const SumItem& item) {
  switch (args.dtype) {
    case DType::kFloat32: return SumItemKernel<S, Float32>(args, item).run();
    case DType::kFloat16: return SumItemKernel<S, Float16>(args, item).run();
    default: return SumItemKernel<S, Bfloat16>(args, item).run();
  }
}

}  // namespace
}  // namespace adaptive::cpu
