// The kernel of decode attention and of its kin that choose keys or score them, one template on a
// SIMD trait and an element type. Keys come in blocks of 64: all query rows score a block, take its
// softmax online and accumulate its values while the block is in cache, so that memory is read once
// whatever the number of rows. A tile of up to 4 rows shares every load. Each row's arithmetic is
// the same in any tile.

#pragma once

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_keys.h"
#include "cpu/linear_unit.h"
#include "cpu/score_tokens_impl.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

template <class S, class E>
class DecodeItemKernel {
 public:
  DecodeItemKernel(const DecodeAttentionArgs& args, const DecodeItem& item,
                   const DecodeScratch& scratch)
      : args_(args),
        item_(item),
        scratch_(scratch),
        head_dim_(static_cast<int>(args.head_dim)),
        units_(head_dim_ / kUnit),
        tail_(head_dim_ % kUnit),
        width_((head_dim_ + kUnit - 1) / kUnit * kUnit),
        rows_(args.heads / args.kv_heads * args.query_tokens),
        keys_(args, item, scratch.seen) {}

  void run() {
    load_query();
    if (item_.sink.weights != nullptr) clear_sink(item_, rows_, args_.mask != nullptr);
    Block<E> blocks[2];
    int current = 0;
    keys_.find(item_.begin, blocks[current]);
    while (blocks[current].count > 0 && blocks[current].first < item_.end) {
      const Block<E>& block = blocks[current];
      Block<E>& next = blocks[1 - current];
      for_tiles([&](auto tile, int64_t row) { score<decltype(tile)::kRows>(block, row); });
      for (int64_t row = 0; row < rows_; ++row) softmax(block, row);
      keys_.find(block.first + kBlockKeys, next);
      current = 1 - current;
      if (args_.value == nullptr) continue;
      for_tiles([&](auto tile, int64_t row) {
        // What is in cache already costs nothing to fetch again.
        const E* const* ahead = row == 0 && next.count > 0 ? next.key : block.value;
        accumulate<decltype(tile)::kRows>(block, ahead, row);
      });
    }
    store_acc();
  }

 private:
  using Vec = typename S::Vec;
  using Unit = LinearUnit<S, E>;
  static constexpr int kUnit = Unit::kElements;

  template <int R>
  struct Tile {
    static constexpr int kRows = R;
  };

  // Covers all rows by tiles of 4; the last tile has 1, 2 or 4 rows (a padding row is a zero).
  template <class F>
  ADAPTIVE_INLINE void for_tiles(F&& body) {
    int64_t row = 0;
    for (; rows_ - row >= 3; row += kTileRows) body(Tile<4>{}, row);
    if (rows_ - row == 2) body(Tile<2>{}, row);
    if (rows_ - row == 1) body(Tile<1>{}, row);
  }

  float* query(int64_t row) const { return scratch_.query + row * width_; }
  float* acc(int64_t row) const { return scratch_.acc + row * width_; }
  float* scores(int64_t row) const { return scratch_.scores + row * kBlockKeys; }
  int64_t head(int64_t row) const {
    return item_.kv_head * (args_.heads / args_.kv_heads) + row / args_.query_tokens;
  }

  // Queries as they are multiplied: float in the element order of load_pair, or as they lie there.
  void load_query() {
    const int64_t padded = (rows_ + kTileRows - 1) / kTileRows * kTileRows;
    for (int64_t i = 0; i < padded * width_; i += S::kWidth) {
      S::store(scratch_.query + i, S::zero());
      S::store(scratch_.acc + i, S::zero());
    }
    for (int64_t row = 0; row < rows_; ++row) {
      const E* from = static_cast<const E*>(args_.query) + item_.batch * args_.query_stride[0] +
                      head(row) * args_.query_stride[1] +
                      row % args_.query_tokens * args_.query_stride[2];
      Unit unit;
      for (int i = 0; i < units_; ++i) {
        unit.load(from + i * kUnit);
        unit.store_input(query(row) + i * Unit::kInputFloats);
      }
      if (tail_ != 0) {
        unit.load_tail(from + units_ * kUnit, tail_);
        unit.store_input(query(row) + units_ * Unit::kInputFloats);
      }
      item_.max[row] = -kInfinity;
      item_.sum[row] = 0;
    }
  }

  // Dot products of R rows with the keys, N at a time; also fetches the values for accumulate.
  template <int R>
  void score(const Block<E>& block, int64_t row) {
    constexpr int N = R == 1 ? 4 : S::kScoredKeys;
    const E* const* ahead = row == 0 ? block.value : block.key;
    for (int i = 0; i < block.count; i += N) {
      Vec sum[R * N];
#pragma GCC unroll 16
      for (int j = 0; j < R * N; ++j) sum[j] = S::zero();
      for (int unit = 0; unit < units_; ++unit) {
        add_products<R, N, false>(block.key + i, ahead + i, row, unit, sum);
      }
      if (tail_ != 0) add_products<R, N, true>(block.key + i, ahead + i, row, units_, sum);
      float out[R * N];
#pragma GCC unroll 4
      for (int j = 0; j < R * N; j += 4) {
        S::reduce4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3], out + j);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __builtin_memcpy(scores(row + r) + i, out + r * N, N * sizeof(float));
      }
    }
  }

  // sum[r * N + n] += query row r * key n, over one unit of elements.
  template <int R, int N, bool kTail>
  ADAPTIVE_INLINE void add_products(const E* const* key, const E* const* ahead, int64_t row,
                                    int unit, Vec (&sum)[R * N]) const {
    Unit keys[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      prefetch<kUnit>(ahead[n] + unit * kUnit);
      if constexpr (kTail) {
        keys[n].load_tail(key[n] + unit * kUnit, tail_);
      } else {
        keys[n].load(key[n] + unit * kUnit);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Unit own;
      own.load_input(query(row + r) + unit * Unit::kInputFloats);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r * N + n] = keys[n].add_product(own, sum[r * N + n]);
    }
  }

  template <bool kTail>
  ADAPTIVE_INLINE void load(const E* from, Vec& a, Vec& b) const {
    if constexpr (kTail) {
      S::load_pair_tail(from, tail_, a, b);
    } else {
      S::load_pair(from, a, b);
    }
  }

  // Turns dot products into exp(score - max), brings the row's sums to the new maximum.
  void softmax(const Block<E>& block, int64_t row) {
    float* s = scores(row);
    const Vec scale = S::set1(args_.scale);
    for (int i = 0; i < block.count; i += S::kWidth) S::store(s + i, S::mul(scale, S::load(s + i)));
    if (args_.softcap > 0) cap(s, block.count);
    keys_.finish_scores(block, row, s);
    for (int i = block.count; i % S::kWidth != 0; ++i) s[i] = -kInfinity;
    const WeightSink& sink = item_.sink;
    if (sink.logits) keep_weights(sink, block, row, s);

    Vec block_max = S::set1(-kInfinity);
    for (int i = 0; i < block.count; i += S::kWidth) block_max = S::max(S::load(s + i), block_max);
    const float old_max = item_.max[row];
    const float candidate = S::reduce_max(block_max);
    const float new_max = candidate > old_max ? candidate : old_max;
    const Vec shift = S::set1(new_max == -kInfinity ? 0 : new_max);
    Vec sum = S::zero();
    for (int i = 0; i < block.count; i += S::kWidth) {
      const Vec weight = exp<S>(S::sub(S::load(s + i), shift));
      S::store(s + i, weight);
      sum = S::add(sum, weight);
    }
    if (new_max != old_max) rescale(row, exp<S>(S::sub(S::set1(old_max), shift)));
    item_.max[row] = new_max;
    item_.sum[row] += S::reduce_add(sum);
    if (sink.weights == nullptr || sink.logits) return;
    keep_weights(sink, block, row, s);
    sink.maxima[(row * sink.stride + block.first) / kBlockKeys] = new_max;
  }

  void cap(float* s, int count) const {
    const Vec softcap = S::set1(args_.softcap);
    for (int i = 0; i < count; i += S::kWidth) {
      S::store(s + i, S::mul(softcap, tanh<S>(S::div(S::load(s + i), softcap))));
    }
  }

  void rescale(int64_t row, Vec factor) const {
    float lanes[S::kWidth];
    S::store(lanes, factor);
    item_.sum[row] *= lanes[0];
    for (int i = 0; i < width_; i += S::kWidth) {
      S::store(acc(row) + i, S::mul(factor, S::load(acc(row) + i)));
    }
  }

  // acc += weights * values for R rows, as many columns at a time as the registers hold. Also
  // fetches the next block's keys.
  template <int R>
  void accumulate(const Block<E>& block, const E* const* ahead, int64_t row) {
    constexpr int kMost = S::kAccumulators / (2 * R);
    int unit = 0;
    if constexpr (kMost >= 4) unit = accumulate_columns<R, 4>(block, ahead, row, unit);
    if constexpr (kMost >= 2) unit = accumulate_columns<R, 2>(block, ahead, row, unit);
    unit = accumulate_columns<R, 1>(block, ahead, row, unit);
    if (tail_ != 0) accumulate_units<R, 1, true>(block, ahead, row, unit);
  }

  template <int R, int U>
  ADAPTIVE_INLINE int accumulate_columns(const Block<E>& block, const E* const* ahead, int64_t row,
                                         int unit) {
    for (; unit + U <= units_; unit += U) accumulate_units<R, U, false>(block, ahead, row, unit);
    return unit;
  }

  template <int R, int U, bool kTail>
  ADAPTIVE_INLINE void accumulate_units(const Block<E>& block, const E* const* ahead, int64_t row,
                                        int unit) {
    const int column = unit * kUnit;
    const float* weights = scores(row);
    Vec sum[R][2 * U];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int u = 0; u < 2 * U; ++u) sum[r][u] = S::load(acc(row + r) + column + u * S::kWidth);
    }
    for (int i = 0; i < block.count; ++i) {
      prefetch<U * kUnit>(ahead[i] + column);
      Vec weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = S::set1(weights[r * kBlockKeys + i]);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        Vec low, high;
        load<kTail>(block.value[i] + column + u * kUnit, low, high);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sum[r][2 * u] = S::fma(weight[r], low, sum[r][2 * u]);
          sum[r][2 * u + 1] = S::fma(weight[r], high, sum[r][2 * u + 1]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int u = 0; u < 2 * U; ++u) S::store(acc(row + r) + column + u * S::kWidth, sum[r][u]);
    }
  }

  // Undoes the element order of load_pair.
  void store_acc() const {
    for (int64_t row = 0; row < rows_; ++row) {
      float* to = item_.acc + row * head_dim_;
      for (int column = 0; column < head_dim_; column += kUnit) {
        float unit[kUnit];
        const float* from = acc(row) + column;
        store_unit<S, E>(S::load(from), S::load(from + S::kWidth), unit);
        const int count = head_dim_ - column < kUnit ? tail_ : kUnit;
        __builtin_memcpy(to + column, unit, count * sizeof(float));
      }
    }
  }

  const DecodeAttentionArgs& args_;
  const DecodeItem& item_;
  const DecodeScratch& scratch_;
  const int head_dim_;
  const int units_;
  const int tail_;   // elements after the last whole unit
  const int width_;  // of a padded row
  const int64_t rows_;
  KeyFinder<E> keys_;
};

template <class S>
void decode_item(const DecodeAttentionArgs& args, const DecodeItem& item,
                 const DecodeScratch& scratch) {
  switch (args.dtype) {
    case DType::kFloat32: return DecodeItemKernel<S, Float32>(args, item, scratch).run();
    case DType::kFloat16: return DecodeItemKernel<S, Float16>(args, item, scratch).run();
    default: return DecodeItemKernel<S, Bfloat16>(args, item, scratch).run();
  }
}

}  // namespace
}  // namespace adaptive::cpu
