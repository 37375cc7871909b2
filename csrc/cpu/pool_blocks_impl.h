// pool_blocks' kernel, one template on a SIMD trait and an element type.

#pragma once

#include "cpu/pool_blocks_kernel.h"
#include "cpu/sum_rows.h"

namespace adaptive::cpu {
namespace {

// The mean of consecutive tokens; without any: zeros.
template <class S, class E>
void pool_block(const PoolBlocksArgs& args, const PoolItem& item) {
  const int64_t tokens = item.end - item.begin, stride = args.source_stride[2];
  const E* source = static_cast<const E*>(args.source) + item.batch * args.source_stride[0] +
                    item.head * args.source_stride[1] + item.begin * stride;
  const auto count = S::set1(tokens > 0 ? static_cast<float>(tokens) : 1.0f);
  const auto row = [=](int64_t i) { return source + i * stride; };
  const auto finish = [=](typename S::Vec sum) { return S::div(sum, count); };
  RowSums<S, E, decltype(row), decltype(finish)>(tokens, static_cast<int>(args.head_dim), row,
                                                 finish, item.mean)
      .run();
}

template <class S>
void pool_item(const PoolBlocksArgs& args, const PoolItem& item) {
  switch (args.dtype) {
    case DType::kFloat32: return pool_block<S, Float32>(args, item);
    case DType::kFloat16: return pool_block<S, Float16>(args, item);
    default: return pool_block<S, Bfloat16>(args, item);
  }
}

}  // namespace
}  // namespace adaptive::cpu
