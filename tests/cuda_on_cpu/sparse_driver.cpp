// Runs the CUDA ops of sparse selection, on the simulator, on random inputs against float64. Every
// buffer ends at its last element, and some lists are broken, so that a sanitizer sees any entry
// that is followed out of bounds.

#include <cstdio>
#include <cstdlib>

#include "gather_attention.h"
#include "score_tokens.h"
#include "sparse_cases.h"
#include "sparse_select.h"
#include "sum_tokens.h"

namespace {

int gather(Random& random) {
  Case c(random);
  const DecodeAttentionArgs& a = c.args;
  const int64_t page = int64_t{1} << random.between(0, 6);
  const Lists lists(random, a.batch * a.kv_heads, (a.capacity + page - 1) / page);
  const int64_t extra = random.chance(0.5) ? 0 : random.between(1, 64);
  const auto extra_key = tensor(random, a.dtype, a.batch, a.kv_heads, extra, a.head_dim);
  const auto extra_value = tensor(random, a.dtype, a.batch, a.kv_heads, extra, a.head_dim);
  std::vector<float> bias(a.batch * a.kv_heads * extra);
  for (float& x : bias) x = random.number();
  GatherAttentionArgs args{};
  args.indices = lists.indices.data();
  args.counts = lists.counts.data();
  args.chosen = lists.chosen;
  args.indices_stride[0] = a.kv_heads * lists.chosen;
  args.indices_stride[1] = lists.chosen;
  args.counts_stride[0] = a.kv_heads;
  args.counts_stride[1] = 1;
  args.page_size = page;
  args.extra = extra;
  args.extra_key = extra_key.elements->data();
  args.extra_value = extra_value.elements->data();
  args.extra_bias = bias.data();
  copy(args.extra_key_stride, extra_key.stride);
  copy(args.extra_value_stride, extra_value.stride);
  copy(args.extra_bias_stride, {a.kv_heads * extra, extra, 1});
  args.attention = a;
  c.workspace.resize(cuda::gather_attention_workspace_bytes(args));
  args.attention.workspace = c.workspace.data();
  args.attention.workspace_bytes = static_cast<int64_t>(c.workspace.size());
  cuda::gather_attention(args, nullptr);

  int wrong = 0;
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t row = 0; row < static_cast<int64_t>(c.lse.size()); ++row) {
    const int64_t t = row % a.query_tokens, h = row / a.query_tokens % a.heads;
    const int64_t b = row / a.query_tokens / a.heads, kv = h / group, list = b * a.kv_heads + kv;
    if (!lists.good(list)) {
      wrong += !std::isnan(c.lse[row]) || !std::isnan(c.out[row * a.head_dim]);
      continue;
    }
    double total = 0, first = 0;
    const auto add = [&](double score, const double* value) {
      total += std::exp(score);
      first += std::exp(score) * value[0];
    };
    for (const int64_t p : lists.of(list)) {
      for (int64_t s = p * page; s < std::min((p + 1) * page, c.limit(b, t)); ++s) {
        add(c.score(b, h, t, at(c.key, b, kv, s)), at(c.value, b, kv, s));
      }
    }
    for (int64_t e = 0; e < extra; ++e) {
      add(c.score(b, h, t, at(extra_key, b, kv, e)) + bias[list * extra + e],
          at(extra_value, b, kv, e));
    }
    wrong += !near(c.lse[row], std::log(total)) ||
             !near(c.out[row * a.head_dim], total > 0 ? first / total : 0);
  }
  return wrong;
}

int score(Random& random) {
  Case c(random);
  if (random.chance(0.5)) c.args.value = c.args.out = nullptr;
  const DecodeAttentionArgs& a = c.args;
  std::vector<float> scores(a.batch * a.kv_heads * a.capacity, kNan);
  ScoreTokensArgs args{a, scores.data(), static_cast<Reduce>(random.between(0, 2)), nullptr, 0};
  c.workspace.resize(cuda::score_tokens_workspace_bytes(args));
  args.workspace = c.workspace.data();
  args.workspace_bytes = static_cast<int64_t>(c.workspace.size());
  cuda::score_tokens(args, nullptr);

  int wrong = 0;
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
    const int64_t s = i % a.capacity, kv = i / a.capacity % a.kv_heads;
    const int64_t b = i / a.capacity / a.kv_heads;
    double made = -INFINITY;
    for (int64_t r = 0; r < group * a.query_tokens; ++r) {
      const int64_t h = kv * group + r / a.query_tokens, t = r % a.query_tokens;
      if (s >= c.limit(b, t)) continue;
      double x = c.score(b, h, t, at(c.key, b, kv, s));
      const float lse = c.lse[(b * a.heads + h) * a.query_tokens + t];
      if (args.reduce != Reduce::kLogit) x = std::exp(x - lse);
      made = args.reduce == Reduce::kSum && made > -INFINITY ? made + x : std::max(made, x);
    }
    wrong += !near(scores[i], made);
  }
  return wrong;
}

int sum(Random& random) {
  Case c(random);
  const DecodeAttentionArgs& a = c.args;
  const Lists lists(random, a.batch * a.kv_heads, a.capacity);
  std::vector<float> sums(a.batch * a.kv_heads * a.head_dim, kNan);
  SumTokensArgs args{a.key, a.dtype, a.batch, a.kv_heads, a.capacity,   a.head_dim, {},
                     {},    {},      {},      {},         lists.chosen, sums.data()};
  copy(args.source_stride, c.key.stride);
  args.indices = lists.indices.data();
  args.counts = lists.counts.data();
  copy(args.indices_stride, {a.kv_heads * lists.chosen, lists.chosen});
  copy(args.counts_stride, {a.kv_heads, 1});
  cuda::sum_tokens(args, nullptr);

  int wrong = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(sums.size()); ++i) {
    const int64_t head = i / a.head_dim;
    double expected = 0;
    if (!lists.good(head)) {
      wrong += !std::isnan(sums[i]);
      continue;
    }
    for (const int64_t s : lists.of(head)) {
      expected += at(c.key, head / a.kv_heads, head % a.kv_heads, s)[i % a.head_dim];
    }
    wrong += !near(sums[i], expected);
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
    const int found[] = {gather(random), score(random), sum(random), select(random)};
    const int here = found[0] + found[1] + found[2] + found[3];
    if (here > 0) {
      std::printf("seed %llu: %d, %d, %d, %d wrong\n", (unsigned long long)seed, found[0], found[1],
                  found[2], found[3]);
    }
    wrong += here;
  }
  std::printf("%llu inputs for each op, %d wrong\n", (unsigned long long)inputs, wrong);
  return wrong == 0 ? 0 : 1;
}
