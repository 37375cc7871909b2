// sum_tokens' kernel, one template on a SIMD trait and an element type.

#pragma once

#include "cpu/decode_attention_kernel.h"
#include "cpu/sum_rows.h"

namespace adaptive::cpu {
namespace {

// Adds up tokens [begin, end) of a list.
template <class S, class E>
void sum_listed(const SumTokensArgs& args, const SumItem& item) {
  const int32_t* tokens = args.indices + item.batch * args.indices_stride[0] +
                          item.kv_head * args.indices_stride[1] + item.begin;
  const E* source = static_cast<const E*>(args.source) + item.batch * args.source_stride[0] +
                    item.kv_head * args.source_stride[1];
  const int64_t stride = args.source_stride[2];
  const auto row = [=](int64_t i) { return source + tokens[i] * stride; };
  const auto finish = [](typename S::Vec sum) { return sum; };
  RowSums<S, E, decltype(row), decltype(finish)>(
      item.end - item.begin, static_cast<int>(args.head_dim), row, finish, item.sums)
      .run();
}

template <class S>
void sum_item(const SumTokensArgs& args, const SumItem& item) {
  switch (args.dtype) {
    case DType::kFloat32: return sum_listed<S, Float32>(args, item);
    case DType::kFloat16: return sum_listed<S, Float16>(args, item);
    default: return sum_listed<S, Bfloat16>(args, item);
  }
}

}  // namespace
}  // namespace adaptive::cpu
