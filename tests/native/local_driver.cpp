// Runs local_attention, with windows or with lists of blocks, on random inputs against its own
// float64 attention. Buffers end exactly at the last element that an input may have, so that a
// sanitizer sees any read or write beyond.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/level.h"
#include "local_attention.h"
#include "random_tensor.h"

namespace {

using adaptive::LocalAttentionArgs;

// A call with everything that it points to.
struct Call {
  LocalAttentionArgs args{};
  Tensor query, key, value;
  std::vector<int32_t> windows, offsets, blocks, counts;
  std::vector<char> out;
  std::vector<float> lse;
};

void draw_sizes(Random& random, LocalAttentionArgs& args) {
  args.dtype =
      std::vector{DType::kFloat32, DType::kFloat16, DType::kBfloat16}[random.between(0, 2)];
  args.batch = random.between(0, 3);
  args.kv_heads = random.between(1, 3);
  args.heads = args.kv_heads * random.between(1, random.chance(0.1) ? 20 : 4);
  args.tokens = random.between(1, random.chance(0.03) ? 400 : random.chance(0.3) ? 150 : 70);
  args.query_tokens = random.chance(0.5) ? args.tokens : random.between(0, args.tokens);
  args.head_dim = 8 * random.between(4, random.chance(0.3) ? 32 : 12);
  args.scale = 1 / std::sqrt(static_cast<float>(args.head_dim));
  args.softcap = random.chance(0.2) ? 2.0f : 0.0f;
  args.causal = random.chance(0.7);
  args.window = random.chance(0.2) ? args.tokens : random.between(1, args.tokens);
  args.sinks = random.chance(0.5) ? 0 : random.between(0, args.tokens);
}

void draw_lists(Random& random, Call& call) {
  LocalAttentionArgs& args = call.args;
  args.block_size = int64_t{16} << random.between(0, 3);
  args.lists = random.chance(0.5) ? args.heads : args.kv_heads;
  args.window = args.tokens;
  args.sinks = 0;
  const int64_t rows = (args.query_tokens + args.block_size - 1) / args.block_size;
  const int64_t blocks = (args.tokens + args.block_size - 1) / args.block_size;
  args.chosen = blocks;
  for (int64_t i = 0; i < args.batch * args.lists * rows; ++i) {
    const size_t begin = call.blocks.size();
    for (int64_t block = 0; block < blocks; ++block) {
      if (random.chance(0.5)) call.blocks.push_back(static_cast<int32_t>(block));
    }
    call.counts.push_back(static_cast<int32_t>(call.blocks.size() - begin));
    call.blocks.resize(begin + blocks, -1);
  }
  call.counts.push_back(0);  // so that there is memory, and lists are told from none
  args.blocks = call.blocks.data();
  args.counts = call.counts.data();
  const int64_t strides[3] = {args.lists * rows, rows, 1};
  for (int axis = 0; axis < 3; ++axis) {
    args.counts_stride[axis] = strides[axis];
    args.blocks_stride[axis] = strides[axis] * blocks;
  }
}

void draw(Random& random, Call& call) {
  LocalAttentionArgs& args = call.args;
  draw_sizes(random, args);
  call.query = tensor(random, args.dtype, args.batch, args.heads, args.query_tokens, args.head_dim);
  call.key = tensor(random, args.dtype, args.batch, args.kv_heads, args.tokens, args.head_dim);
  call.value = tensor(random, args.dtype, args.batch, args.kv_heads, args.tokens, args.head_dim);
  args.query = call.query.elements->data();
  args.key = call.key.elements->data();
  args.value = call.value.elements->data();
  std::memcpy(args.query_stride, call.query.stride, sizeof(call.query.stride));
  std::memcpy(args.key_stride, call.key.stride, sizeof(call.key.stride));
  std::memcpy(args.value_stride, call.value.stride, sizeof(call.value.stride));
  if (random.chance(0.4)) {
    draw_lists(random, call);
  } else if (random.chance(0.3)) {
    for (int64_t head = 0; head < args.heads; ++head) {
      call.windows.push_back(static_cast<int32_t>(random.between(1, args.tokens + 2)));
    }
    args.windows = call.windows.data();
  }
  if (random.chance(0.5)) {
    args.cuts = random.between(2, 6);
    for (int64_t row = 0; row < args.batch; ++row) {
      const auto begin = static_cast<int64_t>(call.offsets.size());
      for (int64_t i = 0; i < args.cuts; ++i) {
        call.offsets.push_back(static_cast<int32_t>(random.between(0, args.tokens)));
      }
      std::sort(call.offsets.begin() + begin, call.offsets.end());
    }
    args.offsets = call.offsets.data();
    args.offsets_stride = args.cuts;
  }
  const int64_t rows = args.batch * args.heads * args.query_tokens;
  call.out.resize(rows * args.head_dim * (args.dtype == DType::kFloat32 ? 4 : 2));
  call.lse.resize(rows, kNan);
  args.out = call.out.data();
  args.lse = call.lse.data();
  args.out_stride[0] = args.heads * args.query_tokens * args.head_dim;
  args.out_stride[1] = args.head_dim;
  args.out_stride[2] = args.heads * args.head_dim;
}

// By the words of local_attention.h.
bool sees(const LocalAttentionArgs& args, int64_t b, int64_t h, int64_t t, int64_t k) {
  const int64_t p = args.tokens - args.query_tokens + t;
  int64_t first = 0, end = args.tokens;
  if (args.offsets != nullptr) {
    const int32_t* cuts = args.offsets + b * args.offsets_stride;
    first = end = -1;
    for (int64_t i = 0; i + 1 < args.cuts; ++i) {
      if (cuts[i] <= p && p < cuts[i + 1]) first = cuts[i], end = cuts[i + 1];
    }
  }
  if (k < first || k >= end || (args.causal && k > p)) return false;
  const int64_t window = args.windows != nullptr ? args.windows[h] : args.window;
  if (std::abs(p - k) >= window && k >= first + args.sinks) return false;
  if (args.counts == nullptr) return true;
  const int64_t list = args.lists == args.heads ? h : h * args.kv_heads / args.heads;
  const int64_t row = b * args.counts_stride[0] + list * args.counts_stride[1] +
                      t / args.block_size * args.counts_stride[2];
  const int32_t* listed = args.blocks + row * args.chosen;
  return std::find(listed, listed + args.counts[row], k / args.block_size) !=
         listed + args.counts[row];
}

double element(const Call& call, int64_t i) {
  if (call.args.dtype == DType::kFloat32) {
    return reinterpret_cast<const float*>(call.out.data())[i];
  }
  uint16_t bits;
  std::memcpy(&bits, call.out.data() + 2 * i, 2);
  return call.args.dtype == DType::kBfloat16 ? Elements::from_bfloat16(bits)
                                             : Elements::from_half(bits);
}

// Compares one row with float64 arithmetic.
bool right(const Call& call, int64_t b, int64_t h, int64_t t) {
  const LocalAttentionArgs& args = call.args;
  const int64_t kv = h / (args.heads / args.kv_heads);
  const auto at = [](const Tensor& x, int64_t i, int64_t j, int64_t k) {
    return &(*x.elements)[i * x.stride[0] + j * x.stride[1] + k * x.stride[2]];
  };
  std::vector<double> sum(args.head_dim);
  double total = 0;
  for (int64_t k = 0; k < args.tokens; ++k) {
    if (!sees(args, b, h, t, k)) continue;
    double score = 0;
    for (int64_t d = 0; d < args.head_dim; ++d) {
      score += at(call.query, b, h, t)[d] * at(call.key, b, kv, k)[d];
    }
    score *= args.scale;
    if (args.softcap > 0) score = args.softcap * std::tanh(score / args.softcap);
    total += std::exp(score);
    for (int64_t d = 0; d < args.head_dim; ++d) {
      sum[d] += std::exp(score) * at(call.value, b, kv, k)[d];
    }
  }
  const double step = args.dtype == DType::kFloat32 ? 1e-4 : 1.0 / 128;
  const int64_t row = b * args.out_stride[0] + h * args.out_stride[1] + t * args.out_stride[2];
  bool good = true;
  for (int64_t d = 0; d < args.head_dim; ++d) {
    good &= std::fabs(element(call, row + d) - (total > 0 ? sum[d] / total : 0)) < step;
  }
  const float made = call.lse[(b * args.heads + h) * args.query_tokens + t];
  const double expected = std::log(total);
  return good && (total > 0 ? std::fabs(made - expected) < 1e-4 : made == expected);
}

// Runs the input of one seed; returns the number of wrong rows.
int run(uint64_t seed) {
  Random random(seed);
  Call call;
  draw(random, call);
  adaptive::cpu::local_attention(call.args);
  int wrong = 0;
  for (int64_t b = 0; b < call.args.batch; ++b) {
    for (int64_t h = 0; h < call.args.heads; ++h) {
      for (int64_t t = 0; t < call.args.query_tokens; ++t) wrong += !right(call, b, h, t);
    }
  }
  if (wrong > 0) std::printf("local, seed %llu: %d wrong\n", (unsigned long long)seed, wrong);
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
    for (uint64_t seed = first; seed < first + inputs; ++seed) wrong += run(seed);
  }
  std::printf("%llu inputs on %d levels, %d wrong rows\n", (unsigned long long)inputs, best + 1,
              wrong);
  return wrong == 0 ? 0 : 1;
}
