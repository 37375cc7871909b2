// verify_samples on the CPU: weights are summed by blocks, and only the block of the draw is read
// again.

#include "verify_samples.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/decode_schedule.h"

namespace adaptive::cpu {
namespace {

constexpr int64_t kBlock = 1024, kSums = 8;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

bool is_weight(float x) { return x >= 0 && x <= std::numeric_limits<float>::max(); }

/// What a token is drawn from: max(p - q, 0), or p without a q; NaN where either is refused.
struct Weights {
  const float* p;
  const float* q;  // or null

  double operator[](int64_t token) const {
    const float other = q == nullptr ? 0 : q[token];
    if (!is_weight(p[token]) || !is_weight(other)) return kNaN;
    return std::max(static_cast<double>(p[token]) - other, 0.0);
  }
};

double sum(const Weights& weights, int64_t begin, int64_t end) {
  double sums[kSums] = {};
  int64_t token = begin;
  for (; token + kSums <= end; token += kSums) {
    for (int64_t i = 0; i < kSums; ++i) sums[i] += weights[token + i];
  }
  for (; token < end; ++token) sums[0] += weights[token];
  double total = 0;
  for (const double each : sums) total += each;
  return total;
}

/// The first of `count` weights with which the sum so far exceeds `bound`, and which is positive;
/// else the last positive one. `before` becomes the sum of those before it.
template <class At>
int64_t find(const At& at, int64_t count, double bound, double& before) {
  int64_t found = -1;
  double sum = before;
  for (int64_t i = 0; i < count; ++i) {
    const double weight = at(i);
    if (weight > 0) {
      found = i;
      before = sum;
      if (sum + weight > bound) break;
    }
    sum += weight;
  }
  return found;
}

/// A token, or -1 if the weights are refused or all 0.
int64_t draw(const Weights& weights, int64_t vocab, float uniform) {
  std::vector<double> blocks((vocab + kBlock - 1) / kBlock);
  double total = 0, before = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t begin = static_cast<int64_t>(i) * kBlock;
    blocks[i] = sum(weights, begin, std::min(begin + kBlock, vocab));
    total += blocks[i];
  }
  if (total == 0 && weights.q != nullptr) return draw({weights.p, nullptr}, vocab, uniform);
  if (!(total > 0)) return -1;
  const double bound = uniform * total;
  const int64_t begin =
      kBlock * find([&](int64_t i) { return blocks[i]; }, blocks.size(), bound, before);
  const int64_t count = std::min(kBlock, vocab - begin);
  return begin + find([&](int64_t i) { return weights[begin + i]; }, count, bound, before);
}

void verify_row(const VerifySamplesArgs& args, int64_t row) {
  const int64_t* drafted = args.drafted + row * args.drafted_stride;
  const float* target = args.target_probs + row * args.target_stride[0];
  const float* draft = args.draft_probs + row * args.draft_stride[0];
  const float* uniforms = args.uniforms + row * args.uniforms_stride;
  const int64_t length = args.lengths ? args.lengths[row] : args.nodes;
  int64_t* tokens = args.tokens + row * (args.nodes + 1);

  int64_t accepted = length;
  bool valid = true;
  for (int64_t node = 0; node < length; ++node) {
    const float p = target[node * args.target_stride[1] + drafted[node]];
    const float q = draft[node * args.draft_stride[1] + drafted[node]];
    valid = valid && is_weight(p) && is_weight(q);
    const bool accept = static_cast<double>(uniforms[node]) * q < p;
    if (!accept) accepted = std::min(accepted, node);
  }
  const Weights weights{target + accepted * args.target_stride[1],
                        accepted < length ? draft + accepted * args.draft_stride[1] : nullptr};
  const int64_t drawn = valid ? draw(weights, args.vocab, uniforms[args.nodes]) : -1;
  args.accepted[row] = drawn < 0 ? -1 : accepted;
  std::fill_n(tokens, args.nodes + 1, -1);
  if (drawn < 0) return;
  std::copy_n(drafted, accepted, tokens);
  tokens[accepted] = drawn;
}

}  // namespace

void verify_samples(const VerifySamplesArgs& args) {
  const int threads = useful_threads(args.batch, args.batch * args.vocab * 8);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < args.batch; ++row) verify_row(args, row);
}

}  // namespace adaptive::cpu
