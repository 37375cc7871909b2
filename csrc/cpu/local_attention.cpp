// local_attention and block_sparse_attention on the CPU: query tokens are cut into items, and the
// heaviest, which stand last, are taken first.

#include "local_attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/decode_schedule.h"
#include "cpu/level.h"
#include "cpu/local_attention_kernel.h"

namespace adaptive::cpu {
namespace {

constexpr int64_t kMinTileTokens = 16;
constexpr int64_t kItemsPerThread = 4;  // at least, so that none waits long for the last
constexpr int64_t kWorkPerThread = int64_t{1}
                                   << 21;  // multiplications; below, waking one costs more

// Tokens of an item: as many columns as there is room for, unless that leaves threads idle; with
// lists, those of one block.
int64_t tile_tokens(const LocalAttentionArgs& args, int64_t heads) {
  if (args.counts != nullptr) return args.block_size;
  const int64_t room = kMaxColumns / heads / kMinTileTokens * kMinTileTokens;
  int64_t tile = std::clamp<int64_t>(room, kMinTileTokens, 2 * kTileKeys);
  const int64_t rows = args.batch * args.heads / heads * args.query_tokens;
  while (tile > kMinTileTokens && rows < tile * kItemsPerThread * omp_get_max_threads()) tile /= 2;
  return tile;
}

// Heads of an item: all that share keys, as far as their columns fit.
int64_t item_heads(const LocalAttentionArgs& args) {
  const int64_t group = args.heads / args.kv_heads;
  if (args.counts != nullptr && args.lists == args.heads) return 1;
  const int64_t tokens = args.counts != nullptr ? args.block_size : kMinTileTokens;
  int64_t heads = std::min(group, kMaxColumns / tokens);
  while (group % heads != 0) --heads;
  return heads;
}

// The keys that the query at `position` sees, before any list.
KeySpan span_of(const LocalAttentionArgs& args, int64_t batch, int64_t window, int64_t position) {
  int64_t first = 0, end = args.tokens;
  if (args.offsets != nullptr) {
    const int32_t* cuts = args.offsets + batch * args.offsets_stride;
    const int32_t* after = std::upper_bound(cuts, cuts + args.cuts, position);
    if (after == cuts || after == cuts + args.cuts) return {0, 0, 0, 0};
    first = after[-1];
    end = after[0];
  }
  const int64_t limit = args.causal ? position + 1 : end;
  const int64_t near_begin = std::max(first, position - window + 1);
  const int64_t near_end = std::min(position + window, limit);
  const int64_t sink_end = std::min(first + args.sinks, limit);
  const auto int32 = [](int64_t place) { return static_cast<int32_t>(place); };
  if (sink_end >= near_begin) return {int32(first), int32(std::max(near_end, sink_end)), 0, 0};
  return {int32(near_begin), int32(near_end), int32(first), int32(sink_end)};
}

void find_spans(const LocalAttentionArgs& args, const LocalItem& item, KeySpan* spans) {
  for (int64_t head = 0; head < item.heads; ++head) {
    KeySpan* own = spans + head * item.tokens;
    if (head > 0 && args.windows == nullptr) {
      std::copy_n(spans, item.tokens, own);
      continue;
    }
    const int64_t window = args.windows != nullptr ? args.windows[item.head + head] : args.window;
    for (int64_t token = 0; token < item.tokens; ++token) {
      const int64_t position = args.tokens - args.query_tokens + item.token + token;
      own[token] = span_of(args, item.batch, window, position);
    }
  }
}

void store_lse(const LocalAttentionArgs& args, const LocalItem& item, const LocalScratch& scratch) {
  for (int64_t column = 0; column < item.heads * item.tokens; ++column) {
    const int64_t row = item.batch * args.heads + item.head + column / item.tokens;
    const int64_t token = item.token + column % item.tokens;
    args.lse[row * args.query_tokens + token] = scratch.max[column] + std::log(scratch.sum[column]);
  }
}

}  // namespace

void local_attention(const LocalAttentionArgs& args) {
  if (args.batch == 0 || args.heads == 0 || args.query_tokens == 0) return;
  const int64_t heads = item_heads(args);
  const int64_t tile = tile_tokens(args, heads);
  const int64_t tiles = (args.query_tokens + tile - 1) / tile;
  const int64_t groups = args.heads / heads;
  const int64_t items = args.batch * groups * tiles;
  const int64_t columns = round_up(heads * std::min(tile, args.query_tokens), kColumnStep);
  const int64_t width = round_up(args.head_dim, kTileWidthStep);
  const int64_t floats = 2 * columns * width + 2 * kTileKeys * width + kTileKeys * kColumnStep +
                         width + 2 * columns + columns * int64_t{sizeof(KeySpan) / sizeof(float)};
  const int64_t stride = round_up(floats, 16);
  const int64_t work = args.batch * args.heads * args.query_tokens * args.head_dim *
                       std::min(args.window + args.sinks, args.tokens);
  const int threads = static_cast<int>(
      std::clamp<int64_t>(std::min(items, work / kWorkPerThread), 1, omp_get_max_threads()));
  const AlignedFloats memory = aligned_floats(threads * stride);
  const LocalKernel kernel = ADAPTIVE_AT_LEVEL(local_item);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    LocalScratch scratch{};
    float* next = memory.get() + omp_get_thread_num() * stride;
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    scratch.query = take(columns * width);
    scratch.acc = take(columns * width);
    scratch.key = take(kTileKeys * width);
    scratch.value = take(kTileKeys * width);
    scratch.scores = take(kTileKeys * kColumnStep);
    scratch.row = take(width);
    scratch.max = take(columns);
    scratch.sum = take(columns);
    scratch.spans = reinterpret_cast<KeySpan*>(next);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < items; ++i) {
      const int64_t which = i % (args.batch * groups);
      const int64_t token = (tiles - 1 - i / (args.batch * groups)) * tile;
      const LocalItem item{.batch = which / groups,
                           .head = which % groups * heads,
                           .heads = heads,
                           .token = token,
                           .tokens = std::min(tile, args.query_tokens - token)};
      find_spans(args, item, scratch.spans);
      kernel(args, item, scratch);
      store_lse(args, item, scratch);
    }
  }
}

}  // namespace adaptive::cpu
