// Which keys an item of local attention goes through, 64 at a time, and which columns see them.

#pragma once

#include "cpu/local_attention_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

/// Up to kTileKeys keys in ascending order: runs of neighbours.
struct KeyTile {
  static constexpr int kMaxRuns = 4;  // blocks of 16
  int count = 0;
  int runs = 0;
  int64_t begin[kMaxRuns];  // position of the first key of each run
  int row[kMaxRuns + 1];    // its number in the tile

  int64_t first() const { return begin[0]; }
  int64_t end() const { return begin[runs - 1] + row[runs] - row[runs - 1]; }
  void add(int64_t position, int keys) {
    begin[runs] = position;
    row[runs] = count;
    row[++runs] = count += keys;
  }
  int64_t position(int number) const {
    int run = 0;
    while (run + 1 < runs && row[run + 1] <= number) ++run;
    return begin[run] + number - row[run];
  }
  /// How many of its keys lie before `position`.
  int before(int64_t position) const {
    int rows = 0;
    for (int run = 0; run < runs; ++run) {
      const int64_t inside = position - begin[run];
      const int length = row[run + 1] - row[run];
      rows += inside <= 0 ? 0 : inside < length ? static_cast<int>(inside) : length;
    }
    return rows;
  }
};

ADAPTIVE_INLINE uint64_t bits_below(int n) {
  return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

/// Bit j: the query sees key j of the tile.
ADAPTIVE_INLINE uint64_t seen_bits(const KeyTile& tile, const KeySpan& span) {
  uint64_t bits = 0;
  if (span.near_begin < span.near_end) {
    bits = bits_below(tile.before(span.near_end)) & ~bits_below(tile.before(span.near_begin));
  }
  if (span.sink_begin < span.sink_end) {
    bits |= bits_below(tile.before(span.sink_end)) & ~bits_below(tile.before(span.sink_begin));
  }
  return bits;
}

/// What the spans of a few columns have in common, to decide most tiles without looking at each.
class SpanBounds {
 public:
  void add(const KeySpan& span) {
    if (span.near_begin < span.near_end) {
      begin_ = min(begin_, span.near_begin), end_ = max(end_, span.near_end);
    }
    if (span.sink_begin < span.sink_end) {
      begin_ = min(begin_, span.sink_begin), sink_end_ = max(sink_end_, span.sink_end);
      sink_begin_ = min(sink_begin_, span.sink_begin);
    }
    near_begin_ = min(near_begin_, span.near_begin);
    last_begin_ = max(last_begin_, span.near_begin);
    first_end_ = min(first_end_, span.near_end);
  }
  /// Every column sees all keys in [begin, end).
  bool whole(int64_t begin, int64_t end) const { return begin >= last_begin_ && end <= first_end_; }
  /// No column sees a key in [begin, end).
  bool none(int64_t begin, int64_t end) const {
    const bool near = begin < end_ && end > near_begin_;
    const bool sink = begin < sink_end_ && end > sink_begin_;
    return !near && !sink;
  }
  int64_t begin() const { return begin_; }
  int64_t end() const { return max(end_, sink_end_); }

 private:
  static constexpr int32_t kMost = 0x7fffffff;
  static int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
  static int32_t max(int32_t a, int32_t b) { return a > b ? a : b; }

  int32_t begin_ = kMost, end_ = 0;              // of all keys that are seen
  int32_t near_begin_ = kMost, last_begin_ = 0;  // least and greatest near_begin
  int32_t first_end_ = kMost;                    // least near_end
  int32_t sink_begin_ = kMost, sink_end_ = 0;
};

/// Goes through the keys from `bounds.begin()` to `bounds.end()`, or through those that are listed.
class KeyWalk {
 public:
  KeyWalk(const LocalAttentionArgs& args, const LocalItem& item, const SpanBounds& bounds)
      : tokens_(args.tokens),
        lists_(args.counts != nullptr),
        block_(args.counts == nullptr ? kTileKeys : static_cast<int>(args.block_size)),
        next_(bounds.begin() / kTileKeys * kTileKeys),
        end_(bounds.end()) {
    if (!lists_) return;
    const int64_t list =
        args.lists == args.heads ? item.head : item.head * args.kv_heads / args.heads;
    const int64_t block = item.token / args.block_size;
    list_ = args.blocks + item.batch * args.blocks_stride[0] + list * args.blocks_stride[1] +
            block * args.blocks_stride[2];
    listed_ = args.counts[item.batch * args.counts_stride[0] + list * args.counts_stride[1] +
                          block * args.counts_stride[2]];
  }

  /// The next tile; one without keys if there is none.
  KeyTile next() {
    KeyTile tile;
    if (!lists_) {
      if (next_ < end_) {
        const int64_t left = tokens_ - next_;
        tile.add(next_, left < kTileKeys ? static_cast<int>(left) : kTileKeys);
        next_ += kTileKeys;
      }
      return tile;
    }
    while (at_ < listed_ && tile.count + (block_ < kTileKeys ? block_ : kTileKeys) <= kTileKeys) {
      const int64_t begin = int64_t{list_[at_]} * block_ + within_;
      const int64_t left = tokens_ - begin;
      const int keys = block_ < kTileKeys ? block_ : kTileKeys;
      if (left > 0 && begin < end_) tile.add(begin, left < keys ? static_cast<int>(left) : keys);
      within_ += keys;
      if (within_ >= block_) within_ = 0, ++at_;
    }
    return tile;
  }

 private:
  const int64_t tokens_;
  const bool lists_;
  const int block_;
  int64_t next_;
  const int64_t end_;
  const int32_t* list_ = nullptr;
  int64_t listed_ = 0, at_ = 0;
  int within_ = 0;  // keys of the current block that are done: one of 128 makes two tiles
};

}  // namespace
}  // namespace adaptive::cpu
