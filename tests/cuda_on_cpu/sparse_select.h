// select_tokens on random scores, some broken, against a sort; for sparse_driver.cpp.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../native/random_tensor.h"
#include "select_tokens.h"

namespace {

using namespace adaptive;

/// Positions of the first `length` scores that select_tokens must choose with a mass of 1.
std::vector<int32_t> best(const SelectTokensArgs& a, const float* line, int32_t length) {
  std::vector<int32_t> chosen, rest;
  int64_t first = -1;
  for (int32_t s = 0; s < length; ++s) {
    if (line[s] == -INFINITY) continue;
    if (first < 0) first = s;
    const bool forced = s < first + a.sinks || s >= length - a.recent;
    (forced ? chosen : rest).push_back(s);
  }
  std::stable_sort(rest.begin(), rest.end(), [&](int x, int y) { return line[x] > line[y]; });
  const auto room = static_cast<size_t>(a.budget) - chosen.size();
  rest.resize(std::min(room, rest.size()));
  chosen.insert(chosen.end(), rest.begin(), rest.end());
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

int select(Random& random) {
  SelectTokensArgs a{};
  a.batch = random.between(1, 2);
  a.kv_heads = random.between(1, 3);
  a.capacity = random.between(1, random.chance(0.2) ? 5000 : 300);
  a.budget = a.width = random.between(1, a.capacity);
  a.sinks = random.between(0, a.budget);
  a.recent = random.between(0, a.budget - a.sinks);
  a.mass = random.chance(0.5) ? 1 : static_cast<double>(random.between(1, 99)) / 100;
  a.scores_stride[0] = a.kv_heads * a.capacity;
  a.scores_stride[1] = a.capacity;
  const int64_t heads = a.batch * a.kv_heads;
  std::vector<float> scores(heads * a.capacity);
  for (float& x : scores) {
    x = static_cast<float>(random.between(0, random.chance(0.5) ? 3 : 9999));
    if (random.chance(0.1)) x = -INFINITY;
  }
  if (random.chance(0.2)) scores[random.between(0, heads * a.capacity - 1)] = kNan;
  std::vector<int32_t> lengths(a.batch), indices(heads * a.width, -7), counts(heads, -7);
  for (int32_t& x : lengths) x = static_cast<int32_t>(random.between(0, a.capacity));
  if (random.chance(0.2))
    lengths[0] = static_cast<int32_t>(random.chance(0.5) ? -1 : a.capacity + 1);
  a.scores = scores.data();
  a.lengths = lengths.data();
  a.indices = indices.data();
  a.counts = counts.data();
  std::vector<char> workspace(cuda::select_tokens_workspace_bytes(a));
  a.workspace = workspace.data();
  a.workspace_bytes = static_cast<int64_t>(workspace.size());
  cuda::select_tokens(a, nullptr);

  int wrong = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const int32_t length = lengths[head / a.kv_heads], count = counts[head];
    const float* line = &scores[head * a.capacity];
    if (length < 0 || length > a.capacity ||
        std::any_of(line, line + length, [](float x) { return std::isnan(x); })) {
      wrong += count != -1 || indices[head * a.width] != -1;
      continue;
    }
    const std::vector<int32_t> all = best(a, line, length);
    const auto made = indices.begin() + head * a.width;
    const bool fits = a.mass == 1 ? count == static_cast<int64_t>(all.size())
                                  : count >= 0 && count <= static_cast<int64_t>(all.size());
    wrong += !fits || (fits && !std::includes(all.begin(), all.end(), made, made + count)) ||
             std::any_of(made + (fits ? count : 0), made + a.width, [](int x) { return x != -1; });
  }
  return wrong;
}

}  // namespace
