// Random inputs for sparse_driver.cpp: queries, caches and lists of chosen entries, some broken.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../native/random_tensor.h"
#include "decode_attention.h"

namespace {

using namespace adaptive;

template <size_t n>
void copy(int64_t (&to)[n], const int64_t (&from)[n]) {
  std::memcpy(to, from, sizeof to);
}

const double* at(const Tensor& x, int64_t i, int64_t j, int64_t k) {
  return &(*x.elements)[i * x.stride[0] + j * x.stride[1] + k * x.stride[2]];
}

/// Ascending lists of entries 0..entries-1, one per KV head; some are broken.
struct Lists {
  int64_t chosen, entries;
  std::vector<int32_t> indices, counts;

  Lists(Random& random, int64_t heads, int64_t entries)
      : chosen(random.between(0, entries)), entries(entries) {
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<int32_t> all(entries);
      for (int64_t i = 0; i < entries; ++i) all[i] = static_cast<int32_t>(i);
      for (int64_t i = entries - 1; i > 0; --i) std::swap(all[i], all[random.between(0, i)]);
      all.resize(chosen);
      std::sort(all.begin(), all.end());
      if (chosen > 0 && random.chance(0.2)) {
        const int64_t wrong[] = {-1, entries, INT32_MAX, INT32_MIN, 0, entries - 1};
        all[random.between(0, chosen - 1)] = static_cast<int32_t>(wrong[random.between(0, 5)]);
      }
      indices.insert(indices.end(), all.begin(), all.end());
      counts.push_back(static_cast<int32_t>(random.between(0, chosen)));
      if (random.chance(0.1)) counts.back() = static_cast<int32_t>(chosen + 1);
      if (random.chance(0.1)) counts.back() = -1;
    }
  }

  bool good(int64_t head) const {
    if (counts[head] < 0 || counts[head] > chosen) return false;
    for (int64_t i = 0; i < counts[head]; ++i) {
      const int32_t x = indices[head * chosen + i];
      if (x < 0 || x >= entries || (i > 0 && x <= indices[head * chosen + i - 1])) return false;
    }
    return true;
  }
  std::vector<int32_t> of(int64_t head) const {
    const auto first = indices.begin() + head * chosen;
    return {first, first + counts[head]};
  }
};

struct Case {
  DecodeAttentionArgs args{};
  Tensor query, key, value;
  std::vector<int32_t> lengths;
  std::vector<float> out, lse;
  std::vector<char> workspace;

  explicit Case(Random& random) {
    args.dtype =
        std::vector{DType::kFloat32, DType::kFloat16, DType::kBfloat16}[random.between(0, 2)];
    args.batch = random.between(1, 2);
    args.kv_heads = random.between(1, 2);
    args.heads = args.kv_heads * random.between(1, 4);
    args.query_tokens = random.chance(0.5) ? 1 : random.between(1, 5);
    args.capacity = random.between(0, random.chance(0.2) ? 400 : 90);
    args.head_dim = 8 * random.between(4, random.chance(0.2) ? 32 : 12);
    args.scale = 1 / std::sqrt(static_cast<float>(args.head_dim));
    args.causal = random.chance(0.7);
    const auto draw = [&](int64_t heads, int64_t tokens) {
      return tensor(random, args.dtype, args.batch, heads, tokens, args.head_dim);
    };
    query = draw(args.heads, args.query_tokens);
    key = draw(args.kv_heads, args.capacity);
    value = draw(args.kv_heads, args.capacity);
    for (int64_t b = 0; b < args.batch; ++b) {
      lengths.push_back(static_cast<int32_t>(random.between(0, args.capacity)));
    }
    args.lengths = lengths.data();
    args.query = query.elements->data();
    args.key = key.elements->data();
    args.value = value.elements->data();
    copy(args.query_stride, query.stride);
    copy(args.key_stride, key.stride);
    copy(args.value_stride, value.stride);
    const int64_t rows = args.batch * args.heads * args.query_tokens;
    out.assign(rows * args.head_dim, kNan);
    lse.assign(rows, kNan);
    args.out = out.data();
    args.lse = lse.data();
    args.out_stride[0] = args.heads * args.query_tokens * args.head_dim;
    args.out_stride[1] = args.query_tokens * args.head_dim;
    args.out_stride[2] = args.head_dim;
  }

  double score(int64_t b, int64_t h, int64_t t, const double* to) const {
    double sum = 0;
    for (int64_t d = 0; d < args.head_dim; ++d) sum += at(query, b, h, t)[d] * to[d];
    return sum * args.scale;
  }
  int64_t limit(int64_t b, int64_t t) const {
    return lengths[b] - (args.causal ? args.query_tokens - t - 1 : 0);
  }
};

bool near(double made, double expected) {
  return made == expected || std::fabs(made - expected) < 1e-4;
}

}  // namespace
