// The product that reads a weight once, for any op that wants its sums: a template on a SIMD trait,
// the type of the weights and what takes the sums. Weight rows come four at a time, and a tile of
// up to 4 input rows shares each load of them; all tiles follow while the weight rows are in cache,
// so that memory is read once whatever the number of rows. Each sum is taken in the same order in
// any tile.

#pragma once

#include "cpu/linear_unit.h"
#include "cpu/simd.h"
#include "cpu/widen.h"
#include "skinny_linear.h"

namespace adaptive::cpu {
namespace {

constexpr int kLinearFeatures = 4;  // weight rows at a time
constexpr int kAheadBytes = 1024;   // of each weight row, fetched before their use

template <class E>
constexpr bool kScaled = false;
template <>
inline constexpr bool kScaled<Int8> = true;

/// `Sink` takes what is computed: sink(row, first, count, sums) gets the sums of `count`
/// neighbouring features of one row, the bias in them. With `kEnds` row r of the input ends before
/// column ends[r], and is 0 from there on: ends descend, with zeros for the rest of the last tile.
/// Columns are read up to the next multiple of 8.
template <class S, class E, class Sink, bool kEnds = false>
class LinearFeatures {
 public:
  LinearFeatures(const SkinnyLinearArgs& args, const float* input, int64_t width, Sink& sink,
                 const int64_t* ends = nullptr)
      : args_(args),
        input_(input),
        width_(width),
        ends_(ends),
        sink_(sink),
        units_of_group_(kScaled<E> ? __builtin_ctzll(args.group / kUnit) : 0) {}

  void run(int64_t begin, int64_t end) const {
    const E* weight = static_cast<const E*>(args_.weight);
    const int64_t last = args_.out_features - 1;
    for (int64_t first = begin; first < end; first += N) {
      Features f{first, static_cast<int>(end - first < N ? end - first : N), {}, {}, {}};
      for (int n = 0; n < N; ++n) {  // beyond the last: the last again, not stored
        const int64_t own = first + n < end ? first + n : end - 1;
        const int64_t next = first + N + n < last ? first + N + n : last;
        f.row[n] = weight + own * args_.weight_stride;
        f.next[n] = weight + next * args_.weight_stride;
        if (kScaled<E>) f.scales[n] = args_.weight_scales + own * args_.scales_stride;
      }
      int64_t row = 0;
      for (; args_.rows - row >= 3; row += 4) tile<4>(f, row);
      if (args_.rows - row == 2) tile<2>(f, row);
      if (args_.rows - row == 1) tile<1>(f, row);
    }
  }

 private:
  using Vec = typename S::Vec;
  using Unit = LinearUnit<S, E, kEnds || !DotsPairs<S, E>>;  // rows that end early are floats
  static constexpr int kUnit = Unit::kElements;
  static constexpr int N = kLinearFeatures;
  static constexpr int64_t kAheadUnits = kAheadBytes / (kUnit * sizeof(E));

  struct Features {
    int64_t first;
    int count;
    const E* row[N];
    const E* next[N];  // those that follow
    const float* scales[N];
  };

  template <int R>
  void tile(const Features& f, int64_t row) const {
    if (row == 0) {
      multiply<R, true>(f, row);
    } else {
      multiply<R, false>(f, row);
    }
  }

  // Not inlined: its loop needs every register, whatever the caller holds.
  template <int R, bool kFetch>
  __attribute__((noinline)) void multiply(const Features& f, int64_t row) const {
    Vec sum[R * N];
#pragma GCC unroll 32
    for (int j = 0; j < R * N; ++j) sum[j] = S::zero();
    const float* input = input_ + row * width_;
    const int64_t columns = kEnds ? (ends_[row] + 7) / 8 * 8 : args_.in_features;
    const int64_t units = columns / kUnit;
    const int tail = static_cast<int>(columns % kUnit);
    int64_t unit = 0;
    if constexpr (kEnds) {
      const auto end = [&](int r) {
        const int64_t own = (ends_[row + r] + kUnit - 1) / kUnit;
        return own < units ? own : units;
      };
      if constexpr (R > 2) add_units<4, kFetch>(f, input, units, end(3), unit, sum);
      if constexpr (R > 2) add_units<3, kFetch>(f, input, units, end(2), unit, sum);
      if constexpr (R > 1) add_units<2, kFetch>(f, input, units, end(1), unit, sum);
    }
    add_units<kEnds ? 1 : R, kFetch>(f, input, units, units, unit, sum);
    if constexpr (!kScaled<E>) {
      if (tail != 0) add_products<R, true>(f, input, units, sum, tail);
    }
    float out[R * N];
#pragma GCC unroll 8
    for (int j = 0; j < R * N; j += 4) {
      S::reduce4(sum[j], sum[j + 1], sum[j + 2], sum[j + 3], out + j);
    }
    const int64_t left = args_.rows - row;
    for (int r = 0; r < (left < R ? left : R); ++r) {
      float* sums = out + r * N;
      for (int n = 0; args_.bias != nullptr && n < f.count; ++n) {
        sums[n] += bias_of(args_, f.first + n);
      }
      sink_(row + r, f.first, f.count, sums);
    }
  }

  // Adds units up to `end`, of `units`, and fetches what comes after them.
  template <int R, bool kFetch>
  ADAPTIVE_INLINE void add_units(const Features& f, const float* input, int64_t units, int64_t end,
                                 int64_t& unit, Vec* sum) const {
    if constexpr (kFetch && S::kFetchesInOrder) {  // the rows that follow, one after another
      for (int n = 0; n < N; ++n) {
        const int64_t begin = n * units / N, own = (n + 1) * units / N,
                      stop = own < end ? own : end;
        for (; unit < stop; ++unit) {
          prefetch<N * kUnit>(f.next[n] + (unit - begin) * N * kUnit);
          add_products<R, false>(f, input, unit, sum);
        }
      }
    } else {  // each row's own columns ahead, then the first ones of those that follow
      const int64_t ahead = kAheadUnits < units ? kAheadUnits : units, turn = units - ahead;
      for (; unit < (turn < end ? turn : end); ++unit) {
        if constexpr (kFetch) fetch(f.row, unit + ahead);
        add_products<R, false>(f, input, unit, sum);
      }
      for (; unit < end; ++unit) {
        if constexpr (kFetch) fetch(f.next, unit - turn);
        add_products<R, false>(f, input, unit, sum);
      }
    }
  }

  static ADAPTIVE_INLINE void fetch(const E* const* rows, int64_t unit) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) prefetch<kUnit, 3>(rows[n] + unit * kUnit);
  }

  // sum[r * N + n] += input row r * weight row n, over one unit of elements.
  template <int R, bool kTail>
  ADAPTIVE_INLINE void add_products(const Features& f, const float* input, int64_t unit, Vec* sum,
                                    [[maybe_unused]] int tail = 0) const {
    Unit weight[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if constexpr (kTail) {
        weight[n].load_tail(f.row[n] + unit * kUnit, tail);
      } else {
        weight[n].load(f.row[n] + unit * kUnit);
      }
      if constexpr (kScaled<E>) weight[n].scale(f.scales[n][unit >> units_of_group_]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Unit own;
      own.load_input(input + r * width_ + unit * Unit::kInputFloats);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[r * N + n] = weight[n].add_product(own, sum[r * N + n]);
    }
  }

  const SkinnyLinearArgs& args_;
  const float* const input_;
  const int64_t width_;
  const int64_t* const ends_;
  Sink& sink_;
  const int units_of_group_;  // as a power of two
};

}  // namespace
}  // namespace adaptive::cpu
