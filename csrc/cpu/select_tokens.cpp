// select_tokens on the CPU: spreads the rows and heads over the threads.

#include "select_tokens.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "cpu/level.h"
#include "cpu/select_tokens_line.h"

namespace adaptive::cpu {
namespace {

constexpr int64_t kBytesPerThread = int64_t{1} << 16;  // below, waking a thread costs more

const SelectKernel& kernel_for(Level level) {
#if defined(__x86_64__)
  if (level >= Level::kAvx512) return kSelectAvx512;
  if (level == Level::kAvx2) return kSelectAvx2;
#endif
  (void)level;
  return kSelectBase;
}

}  // namespace

int64_t select_tokens(const SelectTokensArgs& args) {
  const int64_t lines = args.batch * args.kv_heads;
  const SelectKernel& kernel = kernel_for(level());
  const int64_t useful =
      std::min(lines, lines * args.capacity * int64_t{sizeof(float)} / kBytesPerThread);
  const int threads = static_cast<int>(std::clamp<int64_t>(useful, 1, omp_get_max_threads()));
  std::unique_ptr<std::unique_ptr<Scratch>[]> scratch(new std::unique_ptr<Scratch>[threads]);
  for (int i = 0; i < threads; ++i) {
    scratch[i] = std::make_unique<Scratch>(args.capacity, args.mass < 1);
  }
  int64_t refused = std::numeric_limits<int64_t>::max();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) \
    reduction(min : refused)
  for (int64_t i = 0; i < lines; ++i) {
    const int64_t batch = i / args.kv_heads, head = i % args.kv_heads;
    const float* scores =
        args.scores + batch * args.scores_stride[0] + head * args.scores_stride[1];
    const int64_t length = args.lengths != nullptr ? args.lengths[batch] : args.capacity;
    Line line(args, kernel, scores, length, *scratch[omp_get_thread_num()]);
    if (!line.choose(args.indices + i * args.width, args.counts + i)) {
      refused = std::min(refused, i * args.capacity + line.first_refused());
    }
  }
  return refused == std::numeric_limits<int64_t>::max() ? -1 : refused;
}

}  // namespace adaptive::cpu
