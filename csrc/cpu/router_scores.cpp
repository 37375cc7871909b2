// router_scores on the CPU: one pass over the hidden states; what their sums become is scalar code,
// the same for every instruction set.

#include "router_scores.h"

#include <cmath>
#include <vector>

#include "cpu/decode_schedule.h"
#include "cpu/level.h"
#include "cpu/router_scores_kernel.h"

namespace adaptive::cpu {
namespace {

float score(const RouterScoresArgs& args, const RouterSums& sums) {
  float logit = sums.product;
  if (args.norm_weight != nullptr) {
    logit /= std::sqrt(sums.squares / static_cast<float>(args.width) + args.eps);
  }
  return args.sigmoid ? 1 / (1 + std::exp(-logit)) : logit;
}

}  // namespace

void router_scores(const RouterScoresArgs& args) {
  const int64_t tokens = args.batch * args.tokens;
  const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const RouterKernel kernel = ADAPTIVE_AT_LEVEL(router_kernel)();
  const AlignedFloats router = aligned_floats(round_up(args.width, kRouterStep));
  kernel.prepare(args, router.get());
  std::vector<RouterSums> sums(tokens);
  const int threads = useful_threads(tokens, tokens * args.width * element_bytes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t begin = i * tokens / threads, end = (i + 1) * tokens / threads;
    kernel.sum(args, router.get(), begin, end, sums.data());
    for (int64_t token = begin; token < end; ++token) {
      args.scores[token] = score(args, sums[token]);
    }
  }
}

}  // namespace adaptive::cpu
