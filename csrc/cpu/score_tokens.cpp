// score_tokens and scored_attention on the CPU: the items of decode_attention leave their weights,
// and once the log-sum-exp is known, these become one score per key.

#include "score_tokens.h"

#include <algorithm>
#include <limits>

#include "cpu/decode_schedule.h"

namespace adaptive::cpu {

void score_tokens(const ScoreTokensArgs& args) {
  const DecodeAttentionArgs& sizes = args.attention;
  const int64_t heads = sizes.batch * sizes.kv_heads;
  if (heads == 0 || sizes.heads == 0 || sizes.query_tokens == 0) {
    std::fill_n(args.scores, heads * sizes.capacity, -std::numeric_limits<float>::infinity());
    return;
  }
  DecodeSchedule schedule(sizes, nullptr);
  schedule.keep_weights(args.reduce);
  schedule.run();

  const ReduceKernel reduce = reduce_kernel();
  const int64_t rows = sizes.heads / sizes.kv_heads * sizes.query_tokens;
  const int64_t parts = (sizes.capacity + kItemKeys - 1) / kItemKeys;
#pragma omp parallel for schedule(static) \
    num_threads(schedule.threads()) if (schedule.threads() > 1)
  for (int64_t i = 0; i < heads * parts; ++i) {
    const int64_t head = i / parts;
    const int64_t length =
        sizes.lengths != nullptr ? sizes.lengths[head / sizes.kv_heads] : sizes.capacity;
    const int64_t begin = i % parts * kItemKeys;
    const int64_t end = std::min(begin + kItemKeys, sizes.capacity);
    const int64_t scored = std::clamp(length, begin, end);
    float* scores = args.scores + head * sizes.capacity;
    reduce({.sink = schedule.sink(head),
            .rows = rows,
            .lse = sizes.lse + head * rows,
            .scores = scores,
            .begin = begin,
            .end = scored,
            .reduce = args.reduce});
    std::fill(scores + scored, scores + end, -std::numeric_limits<float>::infinity());
  }
}

}  // namespace adaptive::cpu
