// The kernel of sparse_row_ffn on a SIMD trait. A neuron costs a row of `up`, whose product with an
// input row weighs a row of `down`. Neurons that some row needs come in groups of four: their
// products are taken one by one, while the rows of `down` are on their way from memory; then these
// are added up together, while the next group's rows of `up` are. Each sum of a row is taken in the
// order of its own active neurons, whatever other rows need.

#pragma once

#include "cpu/narrow.h"
#include "cpu/simd.h"
#include "cpu/sparse_row_ffn_kernel.h"

namespace adaptive::cpu {
namespace {

constexpr int kSparseGroup = 4;

/// Whether bits are those of a number other than zero, or NaN.
ADAPTIVE_INLINE bool is_active(Float32 x) { return x.value != 0.0f; }
ADAPTIVE_INLINE bool is_active(Float16 x) { return (x.bits & 0x7fffu) != 0; }
ADAPTIVE_INLINE bool is_active(Bfloat16 x) { return (x.bits & 0x7fffu) != 0; }

template <class S, class E>
class SparseItemKernel {
 public:
  SparseItemKernel(const SparseRowFfnArgs& args, const SparseItem& item)
      : args_(args),
        item_(item),
        rows_(static_cast<int>(args.rows)),
        up_(static_cast<const E*>(args.up)),
        down_(static_cast<const E*>(args.down)) {}

  void run() {
    find_active();
    for (int64_t i = 0; i < args_.rows * item_.out_width; i += S::kWidth) {
      S::store(item_.sums + i, S::zero());
    }
    for (int first = 0; first < active_; first += kSparseGroup) {
      const int count = active_ - first < kSparseGroup ? active_ - first : kSparseGroup;
      weigh(first, count);
      for (int row = 0; row < rows_; ++row) add(row, first, count);
    }
  }

 private:
  using Vec = typename S::Vec;
  static constexpr int kUnit = 2 * S::kWidth;  // elements of one load_pair

  // Lists the neurons that any row needs, and which rows those are.
  void find_active() {
    uint16_t rows_of[kSparsePart];
    const int neurons = static_cast<int>(item_.end - item_.begin);
    for (int i = 0; i < neurons; ++i) rows_of[i] = 0;
    for (int row = 0; row < rows_; ++row) {
      const E* activations =
          static_cast<const E*>(args_.activations) + row * args_.activations_stride + item_.begin;
      for (int i = 0; i < neurons; ++i) {
        rows_of[i] = static_cast<uint16_t>(rows_of[i] | is_active(activations[i]) << row);
      }
    }
    active_ = 0;
    for (int i = 0; i < neurons; ++i) {
      neuron_[active_] = item_.begin + i;
      needed_[active_] = rows_of[i];
      active_ += rows_of[i] != 0;
    }
  }

  const E* up_row(int index) const { return up_ + neuron_[index] * args_.up_stride; }
  const E* down_row(int index) const { return down_ + neuron_[index] * args_.down_stride; }

  // weight_[n][row] = activation * <up, input>, for the neurons of a group.
  void weigh(int first, int count) {
    for (int n = 0; n < count; ++n) {
      const E* next = down_row(first + n);  // fetched while the product is taken
      for (int row = 0; row < rows_; ++row) {
        if ((needed_[first + n] >> row & 1) == 0) continue;
        const float product = multiply(up_row(first + n), item_.input + row * item_.in_width, next);
        const E activation = *(static_cast<const E*>(args_.activations) +
                               row * args_.activations_stride + neuron_[first + n]);
        weight_[n][row] = widen_one(activation) * product;
        next = nullptr;
      }
    }
  }

  static ADAPTIVE_INLINE float widen_one(E x) {
    alignas(64) E lanes[kUnit] = {};
    alignas(64) float wide[kUnit];
    lanes[0] = x;
    Vec low, high;
    S::load_pair(lanes, low, high);
    S::store(wide, low);
    return wide[0];
  }

  __attribute__((noinline)) float multiply(const E* up, const float* input, const E* next) const {
    Vec low_sum = S::zero(), high_sum = S::zero();
    Vec low, high;
    const int64_t whole = args_.in_features / kUnit * kUnit;
    const int64_t fetched = next == nullptr              ? 0
                            : whole < args_.out_features ? whole
                                                         : args_.out_features / kUnit * kUnit;
    for (int64_t i = 0; i < whole; i += kUnit) {
      if (i < fetched) prefetch<kUnit>(next + i);
      S::load_pair(up + i, low, high);
      low_sum = S::fma(S::load(input + i), low, low_sum);
      high_sum = S::fma(S::load(input + i + S::kWidth), high, high_sum);
    }
    if (whole < args_.in_features) {
      S::load_pair_tail(up + whole, static_cast<int>(args_.in_features - whole), low, high);
      low_sum = S::fma(S::load(input + whole), low, low_sum);
      high_sum = S::fma(S::load(input + whole + S::kWidth), high, high_sum);
    }
    return S::reduce_add(S::add(low_sum, high_sum));
  }

  // Adds to a row's sums those rows of `down` in the group that it needs.
  void add(int row, int first, int count) {
    const E* rows[kSparseGroup];
    float weights[kSparseGroup];
    int found = 0;
    for (int n = 0; n < count; ++n) {
      if ((needed_[first + n] >> row & 1) == 0) continue;
      rows[found] = down_row(first + n);
      weights[found++] = weight_[n][row];
    }
    float* sums = item_.sums + row * item_.out_width;
    if (found == 1) add_rows<1>(rows, weights, sums, first);
    if (found == 2) add_rows<2>(rows, weights, sums, first);
    if (found == 3) add_rows<3>(rows, weights, sums, first);
    if (found == 4) add_rows<4>(rows, weights, sums, first);
  }

  template <int N>
  __attribute__((noinline)) void add_rows(const E* const* rows, const float* weights, float* sums,
                                          int first) const {
    const int64_t whole = args_.out_features / kUnit * kUnit;
    const int64_t fetched = whole < args_.in_features ? whole : args_.in_features / kUnit * kUnit;
    const E* next[N];  // rows of `up` that follow; beyond the last: the last again
    Vec weight[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int index = first + kSparseGroup + n;
      next[n] = up_row(index < active_ ? index : active_ - 1);
      weight[n] = S::set1(weights[n]);
    }
    for (int64_t i = 0; i < whole; i += kUnit) {
      Vec low_sum = S::load(sums + i), high_sum = S::load(sums + i + S::kWidth);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        Vec low, high;
        if (i < fetched) prefetch<kUnit>(next[n] + i);
        S::load_pair(rows[n] + i, low, high);
        low_sum = S::fma(weight[n], low, low_sum);
        high_sum = S::fma(weight[n], high, high_sum);
      }
      S::store(sums + i, low_sum);
      S::store(sums + i + S::kWidth, high_sum);
    }
    if (whole == args_.out_features) return;
    Vec low_sum = S::load(sums + whole), high_sum = S::load(sums + whole + S::kWidth);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      Vec low, high;
      S::load_pair_tail(rows[n] + whole, static_cast<int>(args_.out_features - whole), low, high);
      low_sum = S::fma(weight[n], low, low_sum);
      high_sum = S::fma(weight[n], high, high_sum);
    }
    S::store(sums + whole, low_sum);
    S::store(sums + whole + S::kWidth, high_sum);
  }

  const SparseRowFfnArgs& args_;
  const SparseItem& item_;
  const int rows_;
  const E* const up_;
  const E* const down_;
  int active_ = 0;
  int64_t neuron_[kSparsePart];
  uint16_t needed_[kSparsePart];
  float weight_[kSparseGroup][kMaxSparseRows];
};

template <class S, class E>
void widen_sparse_row(const SparseRowFfnArgs& args, int64_t row, float* to) {
  constexpr int kUnit = 2 * S::kWidth;
  const E* from = static_cast<const E*>(args.input) + row * args.input_stride;
  for (int64_t i = 0; i < args.in_features; i += kUnit) {
    typename S::Vec low, high;
    if (i + kUnit <= args.in_features) {
      S::load_pair(from + i, low, high);
    } else {
      S::load_pair_tail(from + i, static_cast<int>(args.in_features - i), low, high);
    }
    S::store(to + i, low);
    S::store(to + i + S::kWidth, high);
  }
}

template <class S, class E>
void narrow_sparse_row(const SparseRowFfnArgs& args, int64_t row, const float* sums) {
  constexpr int kUnit = 2 * S::kWidth;
  E* out = static_cast<E*>(args.out) + row * args.out_features;
  for (int64_t i = 0; i < args.out_features; i += kUnit) {
    float lanes[kUnit];
    store_unit<S, E>(S::load(sums + i), S::load(sums + i + S::kWidth), lanes);
    const int64_t left = args.out_features - i;
    for (int n = 0; n < (left < kUnit ? left : kUnit); ++n) narrow(lanes[n], out + i + n);
  }
}

template <class S>
void run_sparse(const SparseRowFfnArgs& args, const SparseItem& item) {
  switch (args.dtype) {
    case DType::kFloat32: return SparseItemKernel<S, Float32>(args, item).run();
    case DType::kFloat16: return SparseItemKernel<S, Float16>(args, item).run();
    default: return SparseItemKernel<S, Bfloat16>(args, item).run();
  }
}

template <class S>
void widen_sparse(const SparseRowFfnArgs& args, int64_t row, float* to) {
  switch (args.dtype) {
    case DType::kFloat32: return widen_sparse_row<S, Float32>(args, row, to);
    case DType::kFloat16: return widen_sparse_row<S, Float16>(args, row, to);
    default: return widen_sparse_row<S, Bfloat16>(args, row, to);
  }
}

template <class S>
void narrow_sparse(const SparseRowFfnArgs& args, int64_t row, const float* sums) {
  switch (args.dtype) {
    case DType::kFloat32: return narrow_sparse_row<S, Float32>(args, row, sums);
    case DType::kFloat16: return narrow_sparse_row<S, Float16>(args, row, sums);
    default: return narrow_sparse_row<S, Bfloat16>(args, row, sums);
  }
}

template <class S>
constexpr SparseKernel kSparse{&widen_sparse<S>, &run_sparse<S>, &narrow_sparse<S>};

}  // namespace
}  // namespace adaptive::cpu
