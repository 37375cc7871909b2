// How decode attention and its kin cut their keys into items, run them on the threads and merge.
//
// Every row is cut at multiples of kItemKeys whatever the batch, the other rows and the number of
// threads, and its items are merged in order. So a row's result depends on that row alone, bit for
// bit, and a query token gets the result that it would get in a call of its own.

#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "cpu/decode_attention_kernel.h"

namespace adaptive::cpu {

constexpr int64_t kItemKeys = 1024;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct AlignedDelete {
  static constexpr std::align_val_t kAlignment{64};
  void operator()(float* p) const { ::operator delete(p, kAlignment); }
};
using AlignedFloats = std::unique_ptr<float, AlignedDelete>;

/// Uninitialised, on a cache line's boundary.
AlignedFloats aligned_floats(int64_t count);

/// Threads that are worth waking for work that reads `bytes` in `pieces`.
int useful_threads(int64_t pieces, int64_t bytes);

/// The items of a call, and the one workspace behind them.
class DecodeSchedule {
 public:
  /// `list` is null unless keys are chosen; `args` and `list` outlive the schedule.
  DecodeSchedule(const DecodeAttentionArgs& args, const GatherAttentionArgs* list);

  /// Has the items leave their weights too, for `reduce`. Call before run.
  void keep_weights(Reduce reduce);

  /// Computes out (unless it is null) and lse.
  void run() const;

  /// What run left of a (batch row, KV head), after keep_weights.
  WeightSink sink(int64_t head) const;

  int threads() const { return threads_; }

 private:
  int64_t length(int64_t batch) const {
    return args_.lengths != nullptr ? args_.lengths[batch] : args_.capacity;
  }
  int64_t keys(int64_t head) const;
  int64_t parts(int64_t head) const { return first_item_[head + 1] - first_item_[head]; }
  int64_t items() const { return first_item_.back(); }
  DecodeItem item(int64_t index) const;
  DecodeItem part(int64_t head, int64_t within) const;
  DecodeScratch scratch(int thread) const;
  void merge(int64_t head, int64_t row) const;

  const DecodeAttentionArgs& args_;
  const GatherAttentionArgs* const list_;
  const int64_t rows_;           // query rows of a KV head
  const int64_t result_floats_;  // of an item
  const int64_t padded_rows_;
  const int64_t width_;
  const int64_t scratch_floats_;       // of a thread
  std::vector<int64_t> first_item_;    // of each (batch row, KV head); then the number of items
  std::vector<int64_t> first_weight_;  // likewise, in weights_; empty: not kept
  bool logits_ = false;
  int threads_;
  AlignedFloats workspace_;
  AlignedFloats weights_;
};

/// The kernels of the instruction set in use.
DecodeKernel decode_kernel();
ReduceKernel reduce_kernel();
SumKernel sum_kernel();

}  // namespace adaptive::cpu
