// select_tokens of one row and head on the CPU: guesses a limit from a sample, takes what is not
// below it in one pass, and chooses among that. A guess that took too little is followed by a pass
// that takes all, so the result is exact; it depends on nothing but its own scores.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "cpu/select_tokens_cut.h"
#include "cpu/select_tokens_kernel.h"
#include "select_tokens.h"

namespace adaptive::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kSamples = 1024;
constexpr int64_t kSparse = 4;     // sample only where at most one key in so many is wanted
constexpr double kDeviations = 3;  // of the sample's count above the k-th score
constexpr double kUnit = 0x1p-32;

/// A score in units of 2^-32 times the largest, to nearest, ties to even.
inline uint64_t part_of(float score, double unit) {
  return static_cast<uint64_t>(std::nearbyint(static_cast<double>(score) / unit));
}

/// Buffers of one thread, each for every score of a row.
struct Scratch {
  std::unique_ptr<float[]> values;
  std::unique_ptr<int32_t[]> positions;
  std::unique_ptr<uint32_t[]> keys;
  std::unique_ptr<uint64_t[]> parts;

  Scratch(int64_t capacity, bool shares)
      : values(new float[capacity + kTakeSlack]),
        positions(new int32_t[capacity + kTakeSlack]),
        keys(new uint32_t[std::max(capacity, kSamples)]),
        parts(shares ? new uint64_t[capacity] : nullptr) {}
};

/// The selection of one row and head.
class Line {
 public:
  Line(const SelectTokensArgs& args, const SelectKernel& kernel, const float* scores,
       int64_t length, const Scratch& scratch)
      : args_(args),
        kernel_(kernel),
        scores_(scores),
        length_(length),
        values_(scratch.values.get()),
        positions_(scratch.positions.get()),
        keys_(scratch.keys.get()),
        parts_(scratch.parts.get()) {}

  /// Writes the chosen positions and -1 after them, and their number. Returns whether all scores
  /// were valid; if not, what it wrote means nothing.
  bool choose(int32_t* indices, int32_t* count) {
    double unit = 0;
    if (args_.mass < 1) {
      const ScoreScan seen = kernel_.scan(scores_, length_);
      if (!seen.valid) return false;
      unit = static_cast<double>(seen.largest) * kUnit;
    }
    const int64_t first =
        std::find_if(scores_, scores_ + length_, [](float x) { return x != -kInfinity; }) - scores_;
    const int64_t begin = std::min(first + args_.sinks, length_);
    const int64_t end = std::max(begin, length_ - args_.recent);
    const int64_t sinks = take(first, begin, kLowest, 0);
    const int64_t forced = sinks + take(end, length_, kLowest, sinks);
    const int64_t free = std::min(args_.budget - forced, end - begin);

    int64_t found = 0;
    const float limit = guess(begin, end, free);
    found = take(begin, end, limit, forced);
    if (found < free && limit > kLowest) found = take(begin, end, kLowest, forced);
    bool refused = false;
    for (int64_t i = 0; i < forced + found; ++i) refused |= std::isnan(values_[i]);
    if (refused) return false;
    found = keep_highest(forced, found, free);
    if (args_.mass < 1) found = keep_share(forced, found, unit);

    int32_t* to = std::copy_n(positions_, sinks, indices);
    to = std::copy_n(positions_ + forced, found, to);
    to = std::copy_n(positions_ + sinks, forced - sinks, to);
    std::fill(to, indices + args_.width, -1);
    *count = static_cast<int32_t>(forced + found);
    return true;
  }

  /// The first score that choose refuses.
  int64_t first_refused() const {
    return std::find_if(scores_, scores_ + length_,
                        [this](float x) {
                          return std::isnan(x) ||
                                 (args_.mass < 1 && x != -kInfinity && (x < 0 || x == kInfinity));
                        }) -
           scores_;
  }

 private:
  int64_t take(int64_t begin, int64_t end, float limit, int64_t at) {
    return kernel_.take(scores_, begin, end, limit, values_ + at, positions_ + at);
  }

  /// A limit that somewhat more than `wanted` of the scores [begin, end) should reach: above -inf.
  float guess(int64_t begin, int64_t end, int64_t wanted) {
    const int64_t count = end - begin;
    if (wanted <= 0) return kInfinity;
    if (count < kSparse * kSamples || wanted > count / kSparse) return kLowest;
    const int64_t stride = count / kSamples;
    for (int64_t i = 0; i < kSamples; ++i) {
      // Not at equal distances, which periodic scores could be in step with.
      const uint64_t shift = static_cast<uint32_t>(i * 2654435769u) * static_cast<uint64_t>(stride);
      keys_[i] = key_of(scores_[begin + i * stride + static_cast<int64_t>(shift >> 32)]);
    }
    const double mean = static_cast<double>(wanted) * kSamples / static_cast<double>(count);
    const double rank = mean + kDeviations * std::sqrt(mean) + 2;
    const float limit = score_of(kernel_.cut(keys_, kSamples, static_cast<uint64_t>(rank)).key);
    return limit > kLowest ? limit : kLowest;  // also where it is NaN
  }

  /// Keeps the `wanted` highest of the taken [at, at + count), of equal ones the first. Returns how
  /// many are left.
  int64_t keep_highest(int64_t at, int64_t count, int64_t wanted) {
    if (count <= wanted) return count;
    if (wanted <= 0) return 0;
    kernel_.rank(values_ + at, count, keys_);
    const Cut cut = kernel_.cut(keys_, count, wanted);
    return keep(at, count, cut.key, wanted - static_cast<int64_t>(cut.above));
  }

  /// Keeps as few of the taken [at, at + count) as have, with the forced before them, their share.
  int64_t keep_share(int64_t at, int64_t count, double unit) {
    if (unit == 0) return 0;
    const uint64_t total = kernel_.sum_parts(scores_, length_, unit);
    const uint64_t forced = kernel_.sum_parts(values_, at, unit);
    // Two roundings, whatever the compiler likes to contract.
    const volatile double share = args_.mass * static_cast<double>(total);
    const double need = share - static_cast<double>(forced);
    if (!(need > 0)) return 0;
    const auto goal = static_cast<uint64_t>(std::ceil(need));
    uint64_t held = 0;
    for (int64_t i = 0; i < count; ++i) {
      keys_[i] = key_of(values_[at + i]);
      held += parts_[i] = part_of(values_[at + i], unit);
    }
    if (held < goal) return count;
    const Cut cut = kernel_.cut_weights(keys_, parts_, count, goal);
    const uint64_t each = part_of(score_of(cut.key), unit);
    return keep(at, count, cut.key, static_cast<int64_t>((goal - cut.above + each - 1) / each));
  }

  /// Keeps what lies above `key`, and the first `equals` of what equals it.
  int64_t keep(int64_t at, int64_t count, uint32_t key, int64_t equals) {
    int64_t kept = at;
    for (int64_t i = at; i < at + count; ++i) {
      const uint32_t own = key_of(values_[i]);
      const bool equal = own == key && equals > 0;
      equals -= equal;
      values_[kept] = values_[i];
      positions_[kept] = positions_[i];
      kept += own > key || equal;
    }
    return kept - at;
  }

  const SelectTokensArgs& args_;
  const SelectKernel& kernel_;
  const float* scores_;
  const int64_t length_;
  float* values_;       // of what was taken
  int32_t* positions_;  // of what was taken
  uint32_t* keys_;
  uint64_t* parts_;
};

}  // namespace
}  // namespace adaptive::cpu
