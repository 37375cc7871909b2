// combine_tokens on the CPU: in place only listed rows are touched; otherwise each row of the
// result is written once, as a copy or as a sum.

#include "combine_tokens.h"

#include <cstring>
#include <vector>

#include "cpu/combine_tokens_kernel.h"
#include "cpu/decode_schedule.h"
#include "cpu/level.h"

namespace adaptive::cpu {
namespace {

struct Combination {
  const CombineTokensArgs& args;
  const CombineKernel kernel = ADAPTIVE_AT_LEVEL(combine_row);
  const int64_t bytes = args.element_bytes();

  const char* hidden(int64_t batch, int64_t token) const {
    const int64_t at = batch * args.hidden_stride[0] + token * args.hidden_stride[1];
    return static_cast<const char*>(args.hidden) + at * bytes;
  }

  char* out(int64_t batch, int64_t token) const {
    const int64_t at = batch * args.out_stride[0] + token * args.out_stride[1];
    return static_cast<char*>(args.out) + at * bytes;
  }

  void add(int64_t batch, int64_t token, int64_t entry) const {
    const int64_t at = batch * args.update_stride[0] + entry * args.update_stride[1];
    const float* weights = args.weights;
    kernel(args.dtype, args.width,
           {.hidden = hidden(batch, token),
            .update = static_cast<const char*>(args.update) + at * bytes,
            .out = out(batch, token),
            .weight = weights == nullptr ? 1.0f : weights[batch * args.weights_stride + entry]});
  }

  /// Adds to the listed rows alone.
  void in_place() const {
    const int64_t entries = args.batch * args.chosen;
    const int threads = useful_threads(entries, 2 * entries * args.width * bytes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t batch = i / args.chosen, entry = i % args.chosen;
      const int32_t token = args.list[batch * args.list_stride + entry];
      if (token >= 0) add(batch, token, entry);
    }
  }

  void elsewhere() const {
    const int64_t rows = args.batch * args.tokens;
    std::vector<int32_t> entry_of(rows, -1);
    for (int64_t i = 0; i < args.batch * args.chosen; ++i) {
      const int64_t batch = i / args.chosen, entry = i % args.chosen;
      const int32_t token = args.list[batch * args.list_stride + entry];
      if (token >= 0) entry_of[batch * args.tokens + token] = static_cast<int32_t>(entry);
    }
    const int threads = useful_threads(rows, 2 * rows * args.width * bytes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t batch = i / args.tokens, token = i % args.tokens;
      if (entry_of[i] >= 0) {
        add(batch, token, entry_of[i]);
      } else {
        std::memcpy(out(batch, token), hidden(batch, token), args.width * bytes);
      }
    }
  }
};

}  // namespace

void combine_tokens(const CombineTokensArgs& args) {
  const Combination combination{args};
  args.in_place() ? combination.in_place() : combination.elsewhere();
}

}  // namespace adaptive::cpu
