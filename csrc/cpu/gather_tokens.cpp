// gather_tokens on the CPU: copies of whole rows, which the C library does at memory's speed.

#include "gather_tokens.h"

#include <cstring>

#include "cpu/decode_schedule.h"

namespace adaptive::cpu {

void gather_tokens(const GatherTokensArgs& args) {
  const int64_t row_bytes = args.width * args.element_bytes(), rows = args.batch * args.chosen;
  const int threads = useful_threads(rows, rows * row_bytes);
  const auto* hidden = static_cast<const char*>(args.hidden);
  auto* out = static_cast<char*>(args.out);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t batch = i / args.chosen;
    const int32_t token = args.list[batch * args.list_stride + i % args.chosen];
    if (token < 0) {
      std::memset(out + i * row_bytes, 0, row_bytes);
      continue;
    }
    const int64_t from = batch * args.hidden_stride[0] + token * args.hidden_stride[1];
    std::memcpy(out + i * row_bytes, hidden + from * args.element_bytes(), row_bytes);
  }
}

}  // namespace adaptive::cpu
