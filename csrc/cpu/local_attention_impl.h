// The kernel of local attention, one template on a SIMD trait and an element type. A panel of
// queries (panel.h) is scored against 64 keys, takes the softmax online, and accumulates the values
// of those keys, which all panels of the item share. A query's arithmetic is the same in any panel.

#pragma once

#include "cpu/local_attention_kernel.h"
#include "cpu/local_attention_keys.h"
#include "cpu/narrow.h"
#include "cpu/panel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

template <class S, class E>
class LocalItemKernel {
 public:
  LocalItemKernel(const LocalAttentionArgs& args, const LocalItem& item,
                  const LocalScratch& scratch)
      : args_(args),
        item_(item),
        scratch_(scratch),
        head_dim_(static_cast<int>(args.head_dim)),
        tail_(head_dim_ % kUnit),
        width_((head_dim_ + kUnit - 1) / kUnit * kUnit),
        columns_(static_cast<int>(item.heads * item.tokens)),
        panels_((columns_ + kPanel - 1) / kPanel),
        key_(static_cast<const E*>(args.key) + offset(args.key_stride)),
        value_(static_cast<const E*>(args.value) + offset(args.value_stride)) {}

  void run() {
    SpanBounds whole;
    for (int panel = 0; panel < panels_; ++panel) load_panel(panel, whole);
    KeyWalk walk(args_, item_, whole);
    for (KeyTile tile = walk.next(); tile.count > 0; tile = walk.next()) visit(tile);
    for (int column = 0; column < columns_; ++column) store(column);
  }

 private:
  using Vec = typename S::Vec;
  static constexpr int kUnit = 2 * S::kWidth;  // elements of one load_pair
  static constexpr int kPanel = kPanelColumns<S>;
  static constexpr int kRows = kPanelRows<S>;
  static constexpr int kMaxPanels = kMaxColumns / kPanel;

  int64_t offset(const int64_t (&stride)[3]) const {
    return item_.batch * stride[0] + item_.head * args_.kv_heads / args_.heads * stride[1];
  }
  float* query(int panel) const { return scratch_.query + panel * width_ * kPanel; }
  float* acc(int panel) const { return scratch_.acc + panel * width_ * kPanel; }
  int64_t head(int column) const { return item_.head + column / item_.tokens; }
  int64_t token(int column) const { return item_.token + column % item_.tokens; }

  void load_panel(int panel, SpanBounds& whole) {
    float* to = query(panel);
    for (int i = 0; i < width_ * kPanel; i += S::kWidth) {
      S::store(to + i, S::zero());
      S::store(acc(panel) + i, S::zero());
    }
    const Vec scale = S::set1(args_.scale);
    for (int lane = 0; lane < kPanel; ++lane) {
      const int column = panel * kPanel + lane;
      scratch_.max[column] = -kInfinity;
      scratch_.sum[column] = 0;
      if (column >= columns_) {
        scratch_.spans[column] = {0, 0, 0, 0};
        continue;
      }
      bounds_[panel].add(scratch_.spans[column]);
      whole.add(scratch_.spans[column]);
      const E* from = static_cast<const E*>(args_.query) + item_.batch * args_.query_stride[0] +
                      head(column) * args_.query_stride[1] + token(column) * args_.query_stride[2];
      widen_row<S>(from, head_dim_, scratch_.row);
      for (int i = 0; i < width_; i += S::kWidth) {
        S::store(scratch_.row + i, S::mul(scale, S::load(scratch_.row + i)));
      }
      for (int i = 0; i < width_; ++i) to[i * kPanel + lane] = scratch_.row[i];
    }
  }

  void visit(const KeyTile& tile) {
    // Bits of all keys of the tile; of those that some, and that all columns of a panel see.
    const uint64_t every = bits_below(tile.count);
    uint64_t seen = 0;
    uint64_t some[kMaxPanels], all[kMaxPanels];
    for (int panel = 0; panel < panels_; ++panel) {
      some[panel] = all[panel] = 0;
      if (bounds_[panel].none(tile.first(), tile.end())) continue;
      if (bounds_[panel].whole(tile.first(), tile.end())) {
        some[panel] = all[panel] = every;
      } else {
        all[panel] = every;
        const int last = columns_ - panel * kPanel;
        for (int lane = 0; lane < (last < kPanel ? last : kPanel); ++lane) {
          const uint64_t bits = seen_bits(tile, scratch_.spans[panel * kPanel + lane]);
          some[panel] |= bits;
          all[panel] &= bits;
        }
      }
      seen |= some[panel];
    }
    if (seen == 0) return;
    // What no query sees may hold anything, NaN too.
    const int rows = (tile.count + kRows - 1) / kRows * kRows;
    for (int row = 0; row < tile.count; ++row) {
      load_key(row, tile.position(row), (seen >> row & 1) != 0);
    }
    for (int row = tile.count; row < rows; ++row) load_key(row, 0, false);
    for (int panel = 0; panel < panels_; ++panel) {
      if (some[panel] == 0) continue;
      const int begin = __builtin_ctzll(some[panel]) / kRows * kRows;
      const int end = (64 - __builtin_clzll(some[panel]) + kRows - 1) / kRows * kRows;
      attend(tile, panel, begin, end, all[panel] == every);
    }
  }

  ADAPTIVE_INLINE void load_key(int row, int64_t position, bool seen) const {
    float* key = scratch_.key + row * width_;
    float* value = scratch_.value + row * width_;
    if (seen) {
      widen_row<S>(key_ + position * args_.key_stride[2], head_dim_, key);
      widen_row<S>(value_ + position * args_.value_stride[2], head_dim_, value);
      return;
    }
    for (int i = 0; i < width_; i += S::kWidth) {
      S::store(key + i, S::zero());
      S::store(value + i, S::zero());
    }
  }

  // Keys [begin, end) of the tile, which hold all that the panel sees.
  void attend(const KeyTile& tile, int panel, int begin, int end, bool whole) {
    float* scores = scratch_.scores + begin * kPanel;
    for (int row = begin; row < end; row += kRows) {
      multiply_panel<S, false>(scratch_.key + row * width_, width_, 1, query(panel), width_,
                               scratch_.scores + row * kPanel);
    }
    if (args_.softcap > 0) cap_panel<S>(args_.softcap, scores, end - begin);
    if (!whole || end > tile.count) {
      hide_panel<S>(tile, begin, end, scratch_.spans + panel * kPanel, scores);
    }
    weigh_panel<S>(scores, end - begin, scratch_.max + panel * kPanel,
                   scratch_.sum + panel * kPanel, acc(panel), width_);
    for (int i = 0; i < width_; i += kRows) {
      multiply_panel<S, true>(scratch_.value + begin * width_ + i, 1, width_, scores, end - begin,
                              acc(panel) + i * kPanel);
    }
  }

  void store(int column) const {
    const float sum = scratch_.sum[column];
    const float factor = sum == 0 ? 0 : 1 / sum;
    const float* from = acc(column / kPanel) + column % kPanel;
    E* to = static_cast<E*>(args_.out) + item_.batch * args_.out_stride[0] +
            head(column) * args_.out_stride[1] + token(column) * args_.out_stride[2];
    for (int unit = 0; unit < head_dim_; unit += kUnit) {
      const int count = head_dim_ - unit < kUnit ? tail_ : kUnit;
      for (int i = 0; i < count; ++i) {
        const int place = E::kInterleaved ? i / 2 + i % 2 * S::kWidth : i;
        narrow(from[(unit + place) * kPanel] * factor, to + unit + i);
      }
    }
  }

  const LocalAttentionArgs& args_;
  const LocalItem& item_;
  const LocalScratch& scratch_;
  const int head_dim_;
  const int tail_;   // elements after the last whole unit
  const int width_;  // of a padded row
  const int columns_;
  const int panels_;
  const E* const key_;
  const E* const value_;
  SpanBounds bounds_[kMaxPanels];
};

template <class S>
void local_item(const LocalAttentionArgs& args, const LocalItem& item,
                const LocalScratch& scratch) {
  switch (args.dtype) {
    case DType::kFloat32: return LocalItemKernel<S, Float32>(args, item, scratch).run();
    case DType::kFloat16: return LocalItemKernel<S, Float16>(args, item, scratch).run();
    default: return LocalItemKernel<S, Bfloat16>(args, item, scratch).run();
  }
}

}  // namespace
}  // namespace adaptive::cpu
