// merge_tokens on the CPU: a row is one piece of work, so no result depends on another.

#include "merge_tokens.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/decode_schedule.h"
#include "cpu/level.h"
#include "cpu/merge_tokens_kernel.h"

namespace adaptive::cpu {
namespace {

/// What a thread works with, for one row after another.
struct Scratch {
  explicit Scratch(const MergeTokensArgs& a)
      : units(aligned_floats((a.tokens + 3) * padded_metric(a.metric_width))),
        best(a.sources(a.tokens)),
        target(a.sources(a.tokens)),
        order(a.sources(a.tokens)),
        goes(a.tokens),
        start(a.tokens + 1),
        members(a.tokens) {
    // Targets are read four at a time: what lies behind the last must be finite only to be quick.
    std::fill_n(units.get(), (a.tokens + 3) * padded_metric(a.metric_width), 0.0f);
  }

  AlignedFloats units;
  std::vector<float> best;
  std::vector<int32_t> target;
  std::vector<int32_t> order;
  std::vector<char> goes;
  std::vector<int32_t> start;    // of the members of each slot
  std::vector<int32_t> members;  // positions, by slot
};

/// Marks the sources of the most similar pairs.
void choose(const MergeTokensArgs& a, int64_t sources, int64_t pairs, Scratch& s) {
  std::fill(s.goes.begin(), s.goes.end(), 0);
  const auto order = s.order.begin();
  std::iota(order, order + sources, 0);
  const auto before = [&](int32_t i, int32_t j) {
    return s.best[i] != s.best[j] ? s.best[i] > s.best[j] : i < j;
  };
  if (pairs < sources) std::nth_element(order, order + pairs, order + sources, before);
  for (int64_t i = 0; i < pairs; ++i) s.goes[a.first_source() + 2 * s.order[i]] = 1;
}

/// Writes where the tokens of a row go, and lists the members of each slot. Returns their number.
int64_t place(const MergeTokensArgs& a, int64_t row, int64_t length, Scratch& s) {
  int64_t* groups = a.groups + row * a.tokens;
  std::fill_n(groups, a.tokens, -1);
  int64_t slots = 0;
  for (int64_t t = 0; t < length; ++t) {
    if (!s.goes[t]) groups[t] = slots++;
  }
  std::fill(s.start.begin(), s.start.end(), 0);
  for (int64_t t = 0; t < length; ++t) {
    if (s.goes[t]) {
      groups[t] = groups[a.first_target() + 2 * s.target[(t - a.first_source()) / 2]];
    }
    ++s.start[groups[t] + 1];
  }
  std::partial_sum(s.start.begin(), s.start.end(), s.start.begin());
  for (int64_t t = 0; t < length; ++t) s.members[s.start[groups[t]]++] = static_cast<int32_t>(t);
  return slots;
}

void merge_row(const MergeTokensArgs& a, int64_t row, MatchKernel match, GroupKernel average,
               Scratch& s) {
  const int64_t length = a.lengths != nullptr ? a.lengths[row] : a.tokens;
  const int64_t pairs = a.pairs(row, length), sources = pairs > 0 ? a.sources(length) : 0;
  if (pairs > 0) {
    match(a, {.row = row,
              .sources = sources,
              .targets = a.targets(length),
              .units = s.units.get(),
              .best = s.best.data(),
              .target = s.target.data()});
  }
  choose(a, sources, pairs, s);
  const int64_t slots = place(a, row, length, s);
  for (int64_t slot = 0, begin = 0; slot < slots; ++slot) {
    const int64_t end = s.start[slot];  // place() has moved it there
    average(a,
            {.row = row, .members = s.members.data() + begin, .count = end - begin, .slot = slot});
    begin = end;
  }
  const int64_t element_bytes = a.dtype == DType::kFloat32 ? 4 : 2, first = row * a.kept() + slots;
  std::fill_n(a.out_sizes + first, a.kept() - slots, 0.0f);
  std::memset(static_cast<char*>(a.out) + first * a.width * element_bytes, 0,
              (a.kept() - slots) * a.width * element_bytes);
}

}  // namespace

void merge_tokens(const MergeTokensArgs& args) {
  const MatchKernel match = ADAPTIVE_AT_LEVEL(match_sources);
  const GroupKernel average = ADAPTIVE_AT_LEVEL(average_group);
  const int64_t bytes = args.batch * args.tokens * (args.width + args.tokens) * 4;
  const int threads = useful_threads(args.batch, bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch scratch(args);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < args.batch; ++row) merge_row(args, row, match, average, scratch);
  }
}

}  // namespace adaptive::cpu
