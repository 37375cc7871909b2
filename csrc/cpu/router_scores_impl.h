// The kernel of router_scores, a template on a SIMD trait and an element type: two tokens at a
// time, so that their chains of additions overlap; each sum has one order whichever token is alone.

#pragma once

#include "cpu/router_scores_kernel.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

template <class S, class E>
class RouterLoop {
 public:
  RouterLoop(const RouterScoresArgs& args, const float* router) : args_(args), router_(router) {}

  static void prepare(const RouterScoresArgs& args, float* router) {
    const E* first = static_cast<const E*>(args.weight);
    const E* last = first + (args.routes - 1) * args.weight_stride;
    const E* norm = static_cast<const E*>(args.norm_weight);
    for (int64_t at = 0; at < args.width; at += kUnit) {
      const int count = static_cast<int>(args.width - at < kUnit ? args.width - at : kUnit);
      Vec pair[2], other[2];
      load(last + at, count, pair);
      if (args.routes == 2) {
        load(first + at, count, other);
        for (int i = 0; i < 2; ++i) pair[i] = S::sub(pair[i], other[i]);
      }
      if (norm != nullptr) {
        load(norm + at, count, other);
        for (int i = 0; i < 2; ++i) pair[i] = S::mul(pair[i], other[i]);
      }
      for (int i = 0; i < 2; ++i) S::store(router + at + i * S::kWidth, pair[i]);
    }
  }

  void run(int64_t begin, int64_t end, RouterSums* sums) const {
    const bool norm = args_.norm_weight != nullptr;
    for (; end - begin >= 2; begin += 2) {
      norm ? sum<2, true>(begin, sums + begin) : sum<2, false>(begin, sums + begin);
    }
    if (begin < end) norm ? sum<1, true>(begin, sums + begin) : sum<1, false>(begin, sums + begin);
  }

 private:
  using Vec = typename S::Vec;
  static constexpr int kUnit = 2 * S::kWidth;  // elements of one load_pair

  static ADAPTIVE_INLINE void load(const E* from, int count, Vec (&pair)[2]) {
    if (count == kUnit) {
      S::load_pair(from, pair[0], pair[1]);
    } else {
      S::load_pair_tail(from, count, pair[0], pair[1]);
    }
  }

  const E* row(int64_t token) const {
    return static_cast<const E*>(args_.hidden) + token / args_.tokens * args_.hidden_stride[0] +
           token % args_.tokens * args_.hidden_stride[1];
  }

  template <int R, bool kNorm>
  void sum(int64_t token, RouterSums* to) const {
    const E *rows[R], *next[R];
    Vec products[2 * R], squares[2 * R];
    const int64_t last = args_.batch * args_.tokens - 1;
    for (int r = 0; r < R; ++r) {
      rows[r] = row(token + r);
      next[r] = row(token + R + r < last ? token + R + r : last);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * R; ++i) products[i] = squares[i] = S::zero();
    const int64_t whole = args_.width / kUnit * kUnit;
    for (int64_t at = 0; at < whole; at += kUnit) {
      // Rows of a few KiB are pages of their own, at whose ends processors stop fetching ahead.
      for (int r = 0; r < R; ++r) prefetch<kUnit>(next[r] + at);
      add<R, kNorm>(rows, at, kUnit, products, squares);
    }
    const int tail = static_cast<int>(args_.width - whole);
    if (tail != 0) add<R, kNorm>(rows, whole, tail, products, squares);
    for (int r = 0; r < R; ++r) {
      to[r].product = S::reduce_add(S::add(products[2 * r], products[2 * r + 1]));
      to[r].squares = S::reduce_add(S::add(squares[2 * r], squares[2 * r + 1]));
    }
  }

  template <int R, bool kNorm>
  ADAPTIVE_INLINE void add(const E* const (&rows)[R], int64_t at, int count, Vec (&products)[2 * R],
                           Vec (&squares)[2 * R]) const {
    const Vec low = S::load(router_ + at), high = S::load(router_ + at + S::kWidth);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      Vec x[2];
      load(rows[r] + at, count, x);
      products[2 * r] = S::fma(x[0], low, products[2 * r]);
      products[2 * r + 1] = S::fma(x[1], high, products[2 * r + 1]);
      if constexpr (kNorm) {
        squares[2 * r] = S::fma(x[0], x[0], squares[2 * r]);
        squares[2 * r + 1] = S::fma(x[1], x[1], squares[2 * r + 1]);
      }
    }
  }

  const RouterScoresArgs& args_;
  const float* const router_;
};

template <class S>
void prepare_router(const RouterScoresArgs& args, float* router) {
  switch (args.dtype) {
    case DType::kFloat32: return RouterLoop<S, Float32>::prepare(args, router);
    case DType::kFloat16: return RouterLoop<S, Float16>::prepare(args, router);
    default: return RouterLoop<S, Bfloat16>::prepare(args, router);
  }
}

template <class S>
void sum_router(const RouterScoresArgs& args, const float* router, int64_t begin, int64_t end,
                RouterSums* sums) {
  switch (args.dtype) {
    case DType::kFloat32: return RouterLoop<S, Float32>(args, router).run(begin, end, sums);
    case DType::kFloat16: return RouterLoop<S, Float16>(args, router).run(begin, end, sums);
    default: return RouterLoop<S, Bfloat16>(args, router).run(begin, end, sums);
  }
}

}  // namespace
}  // namespace adaptive::cpu
