// route_tokens on the CPU: a row is one piece of work, a few microseconds for thousands of tokens.

#include "route_tokens.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/decode_schedule.h"

namespace adaptive::cpu {
namespace {

constexpr int64_t kBytesPerToken = 16;  // read, written and ranked

/// Which scores are taken: those above a limit, and the first few that equal it.
struct Limit {
  float score;
  int64_t equals;
};

int64_t room(const RouteTokensArgs& args, int64_t present) {
  if (args.share == 0) return args.capacity;
  return std::max<int64_t>(1, static_cast<int64_t>(args.share * static_cast<double>(present)));
}

/// The limit that leaves `wanted` of these scores; reorders them.
Limit highest(std::vector<float>& scores, int64_t wanted) {
  const auto count = static_cast<int64_t>(scores.size());
  if (wanted >= count) return {-std::numeric_limits<float>::infinity(), count};
  std::nth_element(scores.begin(), scores.begin() + (wanted - 1), scores.end(), std::greater<>());
  const float last = scores[wanted - 1];
  const auto above = std::count_if(scores.begin(), scores.begin() + wanted,
                                   [last](float score) { return score > last; });
  return {last, wanted - above};
}

/// Returns the position of a NaN, or -1.
int64_t route_row(const RouteTokensArgs& args, int64_t row) {
  const float* scores = args.scores + row * args.scores_stride;
  const bool* valid = args.valid == nullptr ? nullptr : args.valid + row * args.valid_stride;
  const auto counts = [valid](int64_t token) { return valid == nullptr || valid[token]; };
  for (int64_t token = 0; token < args.tokens; ++token) {
    if (scores[token] != scores[token] && counts(token)) return token;
  }
  Limit limit{args.threshold, args.tokens};
  if (!args.by_threshold()) {
    std::vector<float> present;
    present.reserve(args.tokens);
    for (int64_t token = 0; token < args.tokens; ++token) {
      if (counts(token)) present.push_back(scores[token]);
    }
    limit = highest(present, room(args, static_cast<int64_t>(present.size())));
  }
  int32_t* list = args.list + row * args.tokens;
  int32_t* slots = args.slots + row * args.tokens;
  int32_t count = 0;
  // Without branches: which tokens are taken is as good as random.
  for (int64_t token = 0; token < args.tokens; ++token) {
    const int here = counts(token) ? 1 : 0, above = scores[token] > limit.score ? 1 : 0;
    const int equal = here & (scores[token] == limit.score ? 1 : 0);
    const int taken = (here & above) | (equal & (limit.equals > 0 ? 1 : 0));
    limit.equals -= equal;
    list[count] = static_cast<int32_t>(token);  // overwritten unless it is taken
    slots[token] = taken ? count : -1;
    count += taken;
  }
  std::fill(list + count, list + args.tokens, -1);
  args.counts[row] = count;
  return -1;
}

}  // namespace

int64_t route_tokens(const RouteTokensArgs& args) {
  const int threads = useful_threads(args.batch, args.batch * args.tokens * kBytesPerToken);
  std::vector<int64_t> refused(args.batch);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < args.batch; ++row) refused[row] = route_row(args, row);
  for (int64_t row = 0; row < args.batch; ++row) {
    if (refused[row] >= 0) return row * args.tokens + refused[row];
  }
  return -1;
}

}  // namespace adaptive::cpu
