// Runs decode_attention on random inputs against its own float64 attention. Buffers end exactly at
// the last element that an input may have, so that a sanitizer sees any read beyond.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/level.h"
#include "decode_attention.h"
#include "random_tensor.h"

namespace {

using adaptive::DecodeAttentionArgs;

constexpr double kInf = std::numeric_limits<double>::infinity();

// Compares one call with float64 arithmetic; returns the number of wrong rows.
int run(Random& random, uint64_t seed) {
  DecodeAttentionArgs args{};
  args.dtype =
      std::vector{DType::kFloat32, DType::kFloat16, DType::kBfloat16}[random.between(0, 2)];
  args.batch = random.between(0, 3);
  args.kv_heads = random.between(1, 3);
  args.heads = args.kv_heads * random.between(1, random.chance(0.3) ? 13 : 5);
  args.query_tokens = random.chance(0.5) ? 1 : random.between(1, random.chance(0.3) ? 16 : 4);
  args.capacity = random.between(0, random.chance(0.02) ? 1200 : random.chance(0.3) ? 150 : 70);
  args.head_dim = 8 * random.between(4, random.chance(0.3) ? 32 : 12);
  args.scale = 1 / std::sqrt(static_cast<float>(args.head_dim));
  args.softcap = random.chance(0.2) ? 2.0f : 0.0f;
  args.causal = random.chance(0.7);

  const auto query =
      tensor(random, args.dtype, args.batch, args.heads, args.query_tokens, args.head_dim);
  const auto key =
      tensor(random, args.dtype, args.batch, args.kv_heads, args.capacity, args.head_dim);
  const auto value =
      tensor(random, args.dtype, args.batch, args.kv_heads, args.capacity, args.head_dim);
  args.query = query.elements->data();
  args.key = key.elements->data();
  args.value = value.elements->data();
  std::memcpy(args.query_stride, query.stride, sizeof(query.stride));
  std::memcpy(args.key_stride, key.stride, sizeof(key.stride));
  std::memcpy(args.value_stride, value.stride, sizeof(value.stride));

  std::vector<int32_t> lengths(args.batch);
  for (int32_t& length : lengths) length = static_cast<int32_t>(random.between(0, args.capacity));
  if (random.chance(0.5)) args.lengths = lengths.data();

  // A mask that varies along a random subset of its axes.
  const int64_t sizes[4] = {args.batch, args.heads, args.query_tokens, args.capacity};
  int64_t mask_count = 1;
  for (int axis = 3; axis >= 0; --axis) {
    const bool varies = random.chance(0.6);
    args.mask_stride[axis] = varies ? mask_count : 0;
    if (varies) mask_count *= sizes[axis];
  }
  std::vector<uint8_t> flags(mask_count);
  std::vector<float> biases(mask_count);
  for (int64_t i = 0; i < mask_count; ++i) {
    flags[i] = random.chance(0.6);
    biases[i] = random.chance(0.6) ? random.number() : -static_cast<float>(kInf);
  }
  if (random.chance(0.5)) {
    args.mask_add = random.chance(0.5);
    args.mask = args.mask_add ? static_cast<const void*>(biases.data()) : flags.data();
  }

  std::vector<float> out(args.batch * args.heads * args.query_tokens * args.head_dim, kNan);
  std::vector<float> lse(args.batch * args.heads * args.query_tokens, kNan);
  args.out = out.data();
  args.lse = lse.data();
  args.out_stride[0] = args.heads * args.query_tokens * args.head_dim;
  args.out_stride[1] = args.head_dim;
  args.out_stride[2] = args.heads * args.head_dim;
  adaptive::cpu::decode_attention(args);

  int wrong = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t h = 0; h < args.heads; ++h) {
      for (int64_t t = 0; t < args.query_tokens; ++t) {
        const int64_t kv = h / (args.heads / args.kv_heads);
        const int64_t length = args.lengths ? lengths[b] : args.capacity;
        const int64_t limit = args.causal ? length - args.query_tokens + t + 1 : length;
        const auto at = [](const Tensor& x, int64_t i, int64_t j, int64_t k) {
          return &(*x.elements)[i * x.stride[0] + j * x.stride[1] + k * x.stride[2]];
        };
        std::vector<double> sum(args.head_dim);
        double total = 0;
        for (int64_t s = 0; s < limit; ++s) {
          const int64_t m = b * args.mask_stride[0] + h * args.mask_stride[1] +
                            t * args.mask_stride[2] + s * args.mask_stride[3];
          if (args.mask && !(args.mask_add ? biases[m] > -kInf : flags[m] != 0)) continue;
          double score = 0;
          for (int64_t d = 0; d < args.head_dim; ++d) {
            score += at(query, b, h, t)[d] * at(key, b, kv, s)[d];
          }
          score *= args.scale;
          if (args.softcap > 0) score = args.softcap * std::tanh(score / args.softcap);
          if (args.mask && args.mask_add) score += biases[m];
          const double weight = std::exp(score);
          total += weight;
          for (int64_t d = 0; d < args.head_dim; ++d) sum[d] += weight * at(value, b, kv, s)[d];
        }
        bool good = true;
        const float* row =
            &out[b * args.out_stride[0] + h * args.out_stride[1] + t * args.out_stride[2]];
        for (int64_t d = 0; d < args.head_dim; ++d) {
          good &= std::fabs(row[d] - (total > 0 ? sum[d] / total : 0)) < 1e-4;
        }
        const double expected = std::log(total);
        const float made = lse[(b * args.heads + h) * args.query_tokens + t];
        good &= total > 0 ? std::fabs(made - expected) < 1e-4 : made == expected;
        if (!good) ++wrong;
      }
    }
  }
  if (wrong > 0) std::printf("seed %llu: %d wrong rows\n", (unsigned long long)seed, wrong);
  return wrong;
}

}  // namespace

// Arguments: the first seed, and the number of inputs for each level of this CPU.
int main(int count, char** words) {
  if (count != 3) return 2;
  const uint64_t first = std::strtoull(words[1], nullptr, 10);
  const uint64_t inputs = std::strtoull(words[2], nullptr, 10);
  int wrong = 0;
  const int best = static_cast<int>(adaptive::cpu::best_level());
  for (int level = 0; level <= best; ++level) {
    adaptive::cpu::set_level(static_cast<adaptive::cpu::Level>(level));
    for (uint64_t seed = first; seed < first + inputs; ++seed) {
      Random random(seed);
      wrong += run(random, seed);
    }
  }
  std::printf("%llu inputs on %d levels, %d wrong rows\n", (unsigned long long)inputs, best + 1,
              wrong);
  return wrong == 0 ? 0 : 1;
}
