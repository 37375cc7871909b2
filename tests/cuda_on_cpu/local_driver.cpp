// Runs the CUDA local_attention and pool_blocks, on the simulator, on random inputs against
// float64. Every buffer ends at its last element, and some offsets, windows and lists are broken,
// so that a sanitizer sees any that is followed out of bounds.

#include <bit>
#include <cstdio>
#include <cstdlib>

#include "local_attention.h"
#include "pool_blocks.h"
#include "sparse_cases.h"

namespace {

/// The first element of row `row` of the 16- or 32-bit results.
double element(const std::vector<char>& out, DType dtype, int64_t row, int64_t head_dim) {
  float x = 0;
  uint16_t half = 0;
  if (dtype == DType::kFloat32) {
    std::memcpy(&x, &out[row * head_dim * 4], 4);
    return x;
  }
  std::memcpy(&half, &out[row * head_dim * 2], 2);
  if (dtype == DType::kFloat16) return static_cast<double>(std::bit_cast<_Float16>(half));
  const uint32_t bits = uint32_t{half} << 16;
  std::memcpy(&x, &bits, 4);
  return x;
}

/// Offsets of each row, ascending but for some; `good` tells.
struct Offsets {
  int64_t cuts;
  std::vector<int32_t> at;
  std::vector<bool> good;

  Offsets(Random& random, int64_t batch, int64_t tokens) : cuts(random.between(2, 5)) {
    for (int64_t b = 0; b < batch; ++b) {
      std::vector<int32_t> row(cuts);
      for (int32_t& cut : row) cut = static_cast<int32_t>(random.between(0, tokens));
      std::sort(row.begin(), row.end());
      if (random.chance(0.1))
        row[random.between(0, cuts - 1)] = random.chance(0.5) ? -1 : INT32_MAX;
      good.push_back(row[0] >= 0 && row[cuts - 1] <= tokens &&
                     std::is_sorted(row.begin(), row.end()));
      at.insert(at.end(), row.begin(), row.end());
    }
  }
};

int attend(Random& random) {
  LocalAttentionArgs a{};
  a.dtype = std::vector{DType::kFloat32, DType::kFloat16, DType::kBfloat16}[random.between(0, 2)];
  a.batch = random.between(1, 2);
  a.kv_heads = random.between(1, 2);
  a.heads = a.kv_heads * random.between(1, 5);
  a.tokens = random.between(1, 150);
  a.query_tokens = random.between(1, a.tokens);
  a.head_dim = 8 * random.between(4, random.chance(0.2) ? 32 : 12);
  a.scale = 1 / std::sqrt(static_cast<float>(a.head_dim));
  a.causal = random.chance(0.6);
  a.window = random.between(1, a.tokens);
  a.sinks = random.chance(0.5) ? 0 : random.between(0, a.tokens);
  const Tensor query = tensor(random, a.dtype, a.batch, a.heads, a.query_tokens, a.head_dim);
  const Tensor key = tensor(random, a.dtype, a.batch, a.kv_heads, a.tokens, a.head_dim);
  const Tensor value = tensor(random, a.dtype, a.batch, a.kv_heads, a.tokens, a.head_dim);
  std::vector<int32_t> windows(a.heads, static_cast<int32_t>(a.window));
  if (random.chance(0.3)) {
    for (int32_t& w : windows) w = static_cast<int32_t>(random.between(0, a.tokens));
    a.windows = windows.data();
  }
  const Offsets offsets(random, a.batch, a.tokens);
  const bool cut = random.chance(0.5), listed = random.chance(0.5);
  if (cut) a.offsets = offsets.at.data();
  a.offsets_stride = a.cuts = offsets.cuts;
  a.block_size = int64_t{16} << random.between(0, 3);
  a.lists = random.chance(0.5) ? a.heads : a.kv_heads;
  const int64_t query_blocks = (a.query_tokens + a.block_size - 1) / a.block_size;
  const Lists lists(random, a.batch * a.lists * query_blocks,
                    (a.tokens + a.block_size - 1) / a.block_size);
  a.chosen = lists.chosen;
  if (listed) {
    a.blocks = lists.indices.data();
    a.counts = lists.counts.data();
  }
  copy(a.blocks_stride, {a.lists * query_blocks * a.chosen, query_blocks * a.chosen, a.chosen});
  copy(a.counts_stride, {a.lists * query_blocks, query_blocks, 1});
  const int64_t rows = a.batch * a.heads * a.query_tokens;
  std::vector<char> out(rows * a.head_dim * (a.dtype == DType::kFloat32 ? 4 : 2));
  std::vector<float> lse(rows, kNan);
  a.query = query.elements->data();
  a.key = key.elements->data();
  a.value = value.elements->data();
  a.out = out.data();
  a.lse = lse.data();
  copy(a.query_stride, query.stride);
  copy(a.key_stride, key.stride);
  copy(a.value_stride, value.stride);
  copy(a.out_stride,
       {a.heads * a.query_tokens * a.head_dim, a.query_tokens * a.head_dim, a.head_dim});
  cuda::local_attention(a, nullptr);

  int wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = row % a.query_tokens, h = row / a.query_tokens % a.heads;
    const int64_t b = row / a.query_tokens / a.heads, kv = h / (a.heads / a.kv_heads);
    const int64_t p = a.tokens - a.query_tokens + t;
    const int64_t list =
        (b * a.lists + (a.lists == a.heads ? h : kv)) * query_blocks + t / a.block_size;
    if ((cut && !offsets.good[b]) || windows[h] < 1 || (listed && !lists.good(list))) {
      wrong += !std::isnan(lse[row]) || !std::isnan(element(out, a.dtype, row, a.head_dim));
      continue;
    }
    const std::vector<int32_t> taken = listed ? lists.of(list) : std::vector<int32_t>{};
    double total = 0, first = 0;
    for (int64_t s = 0; s + 1 < (cut ? a.cuts : 2); ++s) {
      const int64_t begin = cut ? offsets.at[b * a.cuts + s] : 0;
      const int64_t end = cut ? offsets.at[b * a.cuts + s + 1] : a.tokens;
      if (p < begin || p >= end) continue;
      for (int64_t k = begin; k < (a.causal ? p + 1 : end); ++k) {
        if (std::abs(p - k) >= windows[h] && k >= begin + a.sinks) continue;
        if (listed && std::find(taken.begin(), taken.end(), k / a.block_size) == taken.end())
          continue;
        double score = 0;
        for (int64_t d = 0; d < a.head_dim; ++d) {
          score += at(query, b, h, t)[d] * at(key, b, kv, k)[d];
        }
        total += std::exp(score * a.scale);
        first += std::exp(score * a.scale) * at(value, b, kv, k)[0];
      }
    }
    const double exact = total > 0 ? first / total : 0;
    wrong += !near(lse[row], std::log(total)) || std::fabs(element(out, a.dtype, row, a.head_dim) -
                                                           exact) > 1e-4 + std::fabs(exact) / 128;
  }
  return wrong;
}

int pool(Random& random) {
  PoolBlocksArgs a{};
  a.dtype = std::vector{DType::kFloat32, DType::kFloat16, DType::kBfloat16}[random.between(0, 2)];
  a.batch = random.between(1, 3);
  a.heads = random.between(1, 3);
  a.tokens = random.between(1, 200);
  a.head_dim = 8 * random.between(4, 32);
  a.block_size = random.between(1, random.chance(0.5) ? 20 : 250);
  const Tensor source = tensor(random, a.dtype, a.batch, a.heads, a.tokens, a.head_dim);
  const Offsets offsets(random, a.batch, a.tokens);
  a.offsets = offsets.at.data();
  a.offsets_stride = a.cuts = offsets.cuts;
  std::vector<float> means(a.batch * a.heads * a.blocks() * a.head_dim, kNan);
  a.source = source.elements->data();
  a.means = means.data();
  copy(a.source_stride, source.stride);
  cuda::pool_blocks(a, nullptr);

  int wrong = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(means.size()); ++i) {
    const int64_t block = i / a.head_dim % a.blocks(), h = i / a.head_dim / a.blocks() % a.heads;
    const int64_t b = i / a.head_dim / a.blocks() / a.heads;
    const int64_t first = offsets.at[b * a.cuts], last = offsets.at[(b + 1) * a.cuts - 1];
    if (first < 0 || last < first || last > a.tokens) {
      wrong += !std::isnan(means[i]);
      continue;
    }
    const int64_t begin = std::max(first, block * a.block_size);
    const int64_t end = std::min(last, (block + 1) * a.block_size);
    double sum = 0;
    for (int64_t t = begin; t < end; ++t) sum += at(source, b, h, t)[i % a.head_dim];
    wrong += !near(means[i], begin < end ? sum / static_cast<double>(end - begin) : 0);
  }
  return wrong;
}

}  // namespace

// Arguments: the first seed, and the number of inputs for each op.
int main(int count, char** words) {
  if (count != 3) return 2;
  const uint64_t first = std::strtoull(words[1], nullptr, 10);
  const uint64_t inputs = std::strtoull(words[2], nullptr, 10);
  int wrong = 0;
  for (uint64_t seed = first; seed < first + inputs; ++seed) {
    Random random(seed);
    const int found[] = {attend(random), pool(random)};
    if (found[0] + found[1] > 0) {
      std::printf("seed %llu: %d, %d wrong\n", (unsigned long long)seed, found[0], found[1]);
    }
    wrong += found[0] + found[1];
  }
  std::printf("%llu inputs for each op, %d wrong\n", (unsigned long long)inputs, wrong);
  return wrong == 0 ? 0 : 1;
}
