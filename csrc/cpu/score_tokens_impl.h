// Weights that decode items leave, and the one score per key that is made of them. Plain loops over
// a block of keys: the compiler vectorises them for the file that includes this.

#pragma once

#include "cpu/decode_attention_kernel.h"
#include "cpu/decode_attention_keys.h"
#include "cpu/simd.h"

namespace adaptive::cpu {
namespace {

/// Marks the keys of an item as seen by no query row, until keep_weights says otherwise. Without a
/// mask there are such keys in the last block only.
inline void clear_sink(const DecodeItem& item, int64_t rows, bool masked) {
  const auto& [weights, stride, maxima, logits] = item.sink;
  const int64_t begin = masked ? item.begin : item.end / kBlockKeys * kBlockKeys;
  const int64_t end = (item.end + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = begin; i < end; ++i) weights[row * stride + i] = logits ? -kInfinity : -1;
  }
}

template <class E>
void keep_weights(const WeightSink& sink, const Block<E>& block, int64_t row, const float* s) {
  float* to = sink.weights + row * sink.stride + block.first;
  if (block.count == kBlockKeys) {
    __builtin_memcpy(to, s, kBlockKeys * sizeof(float));
    return;
  }
  for (int i = 0; i < block.count; ++i) to[block.slot[i]] = s[i];
}

/// The larger; NaN if either is.
ADAPTIVE_INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }

ADAPTIVE_INLINE void max_logits(const ReduceItem& item, int64_t first, int count, float* best) {
  for (int i = 0; i < count; ++i) best[i] = -kInfinity;
  for (int64_t row = 0; row < item.rows; ++row) {
    const float* logits = item.sink.weights + row * item.sink.stride + first;
    for (int i = 0; i < count; ++i) best[i] = larger(best[i], logits[i]);
  }
}

template <class S>
float exp_of(float x) {
  float lanes[S::kWidth];
  S::store(lanes, exp<S>(S::set1(x)));
  return lanes[0];
}

template <class S, bool kSum>
ADAPTIVE_INLINE void combine_weights(const ReduceItem& item, int64_t first, int count,
                                     float* made) {
  const int64_t blocks = item.sink.stride / kBlockKeys;
  for (int i = 0; i < count; ++i) made[i] = 0;
  for (int64_t row = 0; row < item.rows; ++row) {
    const float max = item.sink.maxima[row * blocks + first / kBlockKeys];
    const float factor = item.lse[row] == -kInfinity ? 0 : exp_of<S>(max - item.lse[row]);
    const float* weights = item.sink.weights + row * item.sink.stride + first;
    for (int i = 0; i < count; ++i) {
      const float weight = factor * weights[i];
      made[i] = kSum ? made[i] + weight : larger(made[i], weight);
    }
  }
  const float* marks = item.sink.weights + first;
  for (int i = 0; i < count; ++i) made[i] = marks[i] < 0 ? -kInfinity : made[i];
}

template <class S>
void reduce_item(const ReduceItem& item) {
  for (int64_t first = item.begin; first < item.end; first += kBlockKeys) {
    const int64_t left = item.end - first;
    const int count = left < kBlockKeys ? static_cast<int>(left) : kBlockKeys;
    float made[kBlockKeys];
    switch (item.reduce) {
      case Reduce::kSum: combine_weights<S, true>(item, first, count, made); break;
      case Reduce::kMax: combine_weights<S, false>(item, first, count, made); break;
      case Reduce::kLogit: max_logits(item, first, count, made); break;
    }
    __builtin_memcpy(item.scores + first, made, count * sizeof(float));
  }
}

}  // namespace
}  // namespace adaptive::cpu
