// select_tokens on the CPU. A sample of the scores gives a bound that a little more than the wanted
// number should reach; one pass collects what does, and the exact threshold is found among that. If
// the sample misled, a second pass collects everything.

#include "select_tokens.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "cpu/level.h"
#include "cpu/select_tokens_kernel.h"

namespace adaptive::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kSamples = 1024;
constexpr int64_t kSampleFrom = 4 * kSamples;           // of fewer scores all are collected
constexpr int64_t kScoresPerThread = int64_t{1} << 14;  // below, waking a thread costs more
constexpr int kUnitBits = 32;  // shares are counted in units of 2^-32 of the power above the max

/// One list of scores, and memory to search it in.
class Search {
 public:
  Search(const SelectTokensArgs& args, const SelectKernels& kernels)
      : args_(args),
        kernels_(kernels),
        values_(new float[args.capacity + kSelectSlack]),
        ranked_(new float[args.capacity]),
        positions_(new int32_t[args.capacity + kSelectSlack]) {}

  /// Writes the chosen positions in order, and returns how many; -1 if a score is wrong.
  int32_t run(const float* scores, int64_t length, int32_t* indices) {
    int64_t first = 0;
    while (first < length && scores[first] == -kInfinity) ++first;
    if (first == length) return 0;
    const int64_t middle = std::min(first + args_.sinks, length);
    const int64_t recent = std::max(length - args_.recent, middle);
    if (args_.mass < 1) {
      const ScoreRange range = kernels_.range(scores + first, length - first);
      if (range.wrong) return -1;
      int exponent = 0;
      std::frexp(range.max, &exponent);
      scale_ = std::ldexp(1.0, kUnitBits - exponent);
    }
    int32_t* to = copy_seen(scores, first, middle, indices);
    int32_t* const ends = copy_seen(scores, recent, length, to);  // to count them
    if (ends == nullptr) return -1;
    if (!choose(scores, middle, recent, args_.budget - (ends - indices))) return -1;
    if (args_.mass < 1) {
      const double total = kernels_.sum(scores + first, length - first, scale_);
      const double forced = kernels_.sum(scores + first, middle - first, scale_) +
                            kernels_.sum(scores + recent, length - recent, scale_);
      keep_share(args_.mass * total, forced);
    }
    for (int64_t i = 0; i < collected_; ++i) {
      const bool tie = values_[i] == threshold_;
      if (values_[i] > threshold_ || (tie && ties_ > 0)) *to++ = positions_[i];
      ties_ -= tie;
    }
    return static_cast<int32_t>(copy_seen(scores, recent, length, to) - indices);
  }

 private:
  // Positions of the scores that are not -inf; null if one is NaN. Does not write past the width.
  int32_t* copy_seen(const float* scores, int64_t begin, int64_t end, int32_t* to) const {
    for (int64_t i = begin; to != nullptr && i < end; ++i) {
      if (std::isnan(scores[i])) return nullptr;
      if (scores[i] != -kInfinity) *to++ = static_cast<int32_t>(i);
    }
    return to;
  }

  // Finds the threshold, and how many ties with it count, for the `wanted` highest of scores
  // [begin, end). Returns whether all is well with them.
  bool choose(const float* scores, int64_t begin, int64_t end, int64_t wanted) {
    bool nan = false;
    float bound = sampled_bound(scores, begin, end, wanted);
    collect(scores, begin, end, bound, nan);
    if (collected_ < wanted && bound > kLowest) collect(scores, begin, end, kLowest, nan);
    chosen_ = std::min(wanted, collected_);
    std::copy_n(values_.get(), collected_, ranked_.get());
    if (chosen_ < collected_ && chosen_ > 0) {
      std::nth_element(ranked_.get(), ranked_.get() + chosen_ - 1, ranked_.get() + collected_,
                       std::greater<>());
    }
    cut(chosen_ > 0 ? *std::min_element(ranked_.get(), ranked_.get() + chosen_) : kInfinity);
    return !nan;
  }

  void collect(const float* scores, int64_t begin, int64_t end, float bound, bool& nan) {
    collected_ = kernels_.collect(scores, begin, end, bound, values_.get(), positions_.get(), nan);
  }

  // What about `wanted` of the scores reach, and rather more than fewer.
  float sampled_bound(const float* scores, int64_t begin, int64_t end, int64_t wanted) const {
    const int64_t count = end - begin;
    if (count < kSampleFrom || wanted > count / 2) return kLowest;
    float samples[kSamples];
    const int64_t step = count / kSamples;
    for (int64_t i = 0; i < kSamples; ++i) {
      const float score = scores[begin + i * step];
      samples[i] = std::isnan(score) ? -kInfinity : score;
    }
    const double expected = double(wanted) * kSamples / double(count);
    const auto rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
    if (rank >= kSamples) return kLowest;
    std::nth_element(samples, samples + rank, samples + kSamples, std::greater<>());
    return std::max(samples[rank], kLowest);
  }

  // Of the chosen scores, ranked_[0, chosen_), keeps those that with `forced` first reach `needed`.
  void keep_share(double needed, double forced) {
    std::sort(ranked_.get(), ranked_.get() + chosen_, std::greater<>());
    int64_t kept = 0;
    for (double held = forced; kept < chosen_ && held < needed; ++kept) {
      held += std::nearbyint(double(ranked_[kept]) * scale_);
    }
    chosen_ = kept;
    cut(kept > 0 ? ranked_[kept - 1] : kInfinity);
  }

  // Sets the threshold; counts how many of the chosen tie with it.
  void cut(float threshold) {
    threshold_ = threshold;
    ties_ = std::count(ranked_.get(), ranked_.get() + chosen_, threshold);
  }

  const SelectTokensArgs& args_;
  const SelectKernels kernels_;
  const std::unique_ptr<float[]> values_;
  const std::unique_ptr<float[]> ranked_;
  const std::unique_ptr<int32_t[]> positions_;
  int64_t collected_ = 0;  // scores in values_, their positions in positions_
  int64_t chosen_ = 0;
  float threshold_ = 0;
  int64_t ties_ = 0;
  double scale_ = 0;
};

}  // namespace

void select_tokens(const SelectTokensArgs& args) {
  const int64_t lists = args.batch * args.kv_heads;
  const int64_t useful = std::min(lists, lists * args.capacity / kScoresPerThread);
  const int threads = static_cast<int>(std::clamp<int64_t>(useful, 1, omp_get_max_threads()));
  const SelectKernels kernels = ADAPTIVE_AT_LEVEL(select_kernels)();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Search search(args, kernels);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < lists; ++i) {
      const int64_t batch = i / args.kv_heads;
      const float* scores =
          args.scores + batch * args.scores_stride[0] + i % args.kv_heads * args.scores_stride[1];
      const int64_t length = args.lengths != nullptr ? args.lengths[batch] : args.capacity;
      int32_t* indices = args.indices + i * args.width;
      args.counts[i] = search.run(scores, length, indices);
      std::fill(indices + std::max(args.counts[i], 0), indices + args.width, -1);
    }
  }
}

}  // namespace adaptive::cpu
