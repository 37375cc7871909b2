// sum_tokens on the CPU: lists are cut at multiples of kItemKeys, and the pieces added in order.

#include "sum_tokens.h"

#include <algorithm>

#include "cpu/decode_schedule.h"

namespace adaptive::cpu {

void sum_tokens(const SumTokensArgs& args) {
  const int64_t heads = args.batch * args.kv_heads;
  const int64_t parts = std::max<int64_t>(1, (args.chosen + kItemKeys - 1) / kItemKeys);
  const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const int threads =
      useful_threads(heads * parts, heads * args.chosen * args.head_dim * element_bytes);
  const AlignedFloats pieces = aligned_floats(heads * parts * args.head_dim);
  const SumKernel kernel = sum_kernel();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * parts; ++i) {
      const int64_t batch = i / parts / args.kv_heads, kv_head = i / parts % args.kv_heads;
      const int64_t count =
          args.counts[batch * args.counts_stride[0] + kv_head * args.counts_stride[1]];
      const int64_t begin = std::min(i % parts * kItemKeys, count);
      kernel(args, {.batch = batch,
                    .kv_head = kv_head,
                    .begin = begin,
                    .end = std::min(begin + kItemKeys, count),
                    .sums = pieces.get() + i * args.head_dim});
    }
#pragma omp for schedule(static)
    for (int64_t head = 0; head < heads; ++head) {
      float* sums = args.sums + head * args.head_dim;
      std::fill_n(sums, args.head_dim, 0.0f);
      for (int64_t part = 0; part < parts; ++part) {
        const float* piece = pieces.get() + (head * parts + part) * args.head_dim;
        for (int64_t d = 0; d < args.head_dim; ++d) sums[d] += piece[d];
      }
    }
  }
}

}  // namespace adaptive::cpu
