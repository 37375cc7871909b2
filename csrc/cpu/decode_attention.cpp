// decode_attention on the CPU: cuts the keys into items, runs them on the threads, merges.
//
// Every row is cut at multiples of kItemKeys whatever the batch, the other rows and the number of
// threads, and its items are merged in order. So a row's result depends on that row alone, bit for
// bit, and a query token gets the result that it would get in a call of its own.

#include "decode_attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/decode_attention_kernel.h"
#include "cpu/level.h"

namespace adaptive::cpu {
namespace {

constexpr int64_t kItemKeys = 1024;
constexpr int64_t kItemsPerThread = 8;                 // taken at a time: total / (threads * this)
constexpr int64_t kBytesPerThread = int64_t{1} << 17;  // below, waking a thread costs more
constexpr size_t kAlignment = 64;
constexpr int64_t kAlignedFloats = kAlignment / sizeof(float);

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

DecodeKernel kernel_for(Level level) {
#if defined(__x86_64__)
  if (level == Level::kAvx512) return decode_item_avx512;
  if (level == Level::kAvx2) return decode_item_avx2;
#endif
  (void)level;
  return decode_item_base;
}

/// The items of a call, and the one workspace behind them.
class Schedule {
 public:
  explicit Schedule(const DecodeAttentionArgs& args)
      : args_(args),
        rows_(args.heads / args.kv_heads * args.query_tokens),
        result_floats_(round_up(rows_ * (args.head_dim + 2), kAlignedFloats)),
        padded_rows_(round_up(rows_, kTileRows)),
        width_(round_up(args.head_dim, kWidthStep)),
        scratch_floats_(round_up(padded_rows_ * (2 * width_ + kBlockKeys + 2), kAlignedFloats)) {
    first_item_.reserve(args.batch + 1);
    first_item_.push_back(0);
    int64_t keys = 0;
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      first_item_.push_back(first_item_.back() + args.kv_heads * parts(batch));
      keys += length(batch) * args.kv_heads;
    }
    const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t bytes = 2 * keys * args.head_dim * element_bytes;
    const int64_t useful = std::min(items(), bytes / kBytesPerThread);
    threads_ = static_cast<int>(std::clamp<int64_t>(useful, 1, omp_get_max_threads()));

    const int64_t floats = items() * result_floats_ + threads_ * scratch_floats_;
    workspace_.reset(
        static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t{kAlignment})));
  }

  int64_t items() const { return first_item_.back(); }
  int threads() const { return threads_; }
  int chunk() const {
    return static_cast<int>(std::max<int64_t>(1, items() / (threads_ * kItemsPerThread)));
  }

  DecodeItem item(int64_t index) const {
    const auto after = std::upper_bound(first_item_.begin(), first_item_.end(), index);
    const int64_t batch = after - first_item_.begin() - 1;
    const int64_t within = index - first_item_[batch];
    const int64_t begin = within % parts(batch) * kItemKeys;
    float* result = workspace_.get() + index * result_floats_;
    return {.batch = batch,
            .kv_head = within / parts(batch),
            .begin = begin,
            .end = std::min(begin + kItemKeys, length(batch)),
            .acc = result,
            .max = result + rows_ * args_.head_dim,
            .sum = result + rows_ * (args_.head_dim + 1)};
  }

  DecodeScratch scratch(int thread) const {
    float* start = workspace_.get() + items() * result_floats_ + thread * scratch_floats_;
    float* scores = start + 2 * padded_rows_ * width_;
    return {.query = start,
            .acc = start + padded_rows_ * width_,
            .scores = scores,
            .seen = reinterpret_cast<uint64_t*>(scores + padded_rows_ * kBlockKeys)};
  }

  /// Writes the result of query row `row` of a (batch row, KV head) from its items.
  void merge(int64_t batch, int64_t kv_head, int64_t row) const {
    const int64_t head = kv_head * (args_.heads / args_.kv_heads) + row / args_.query_tokens;
    const int64_t token = row % args_.query_tokens;
    float* out = args_.out + batch * args_.out_stride[0] + head * args_.out_stride[1] +
                 token * args_.out_stride[2];
    const int64_t first = first_item_[batch] + kv_head * parts(batch);
    const int64_t last = first + parts(batch);

    float max = -std::numeric_limits<float>::infinity();
    for (int64_t i = first; i < last; ++i) max = std::max(max, item(i).max[row]);
    const float shift = std::isinf(max) && max < 0 ? 0 : max;
    float sum = 0;
    std::fill_n(out, args_.head_dim, 0.0f);
    for (int64_t i = first; i < last; ++i) {
      const DecodeItem part = item(i);
      const float weight = std::exp(part.max[row] - shift);
      const float* acc = part.acc + row * args_.head_dim;
      sum += weight * part.sum[row];
      for (int64_t d = 0; d < args_.head_dim; ++d) out[d] += weight * acc[d];
    }
    const float factor = sum == 0 ? 0 : 1 / sum;
    for (int64_t d = 0; d < args_.head_dim; ++d) out[d] *= factor;
    args_.lse[(batch * args_.heads + head) * args_.query_tokens + token] = max + std::log(sum);
  }

 private:
  int64_t length(int64_t batch) const {
    return args_.lengths != nullptr ? args_.lengths[batch] : args_.capacity;
  }
  int64_t parts(int64_t batch) const {
    return std::max<int64_t>(1, (length(batch) + kItemKeys - 1) / kItemKeys);
  }

  const DecodeAttentionArgs& args_;
  const int64_t rows_;           // query rows of a KV head
  const int64_t result_floats_;  // of an item
  const int64_t padded_rows_;
  const int64_t width_;
  const int64_t scratch_floats_;     // of a thread
  std::vector<int64_t> first_item_;  // of each batch row; then the number of items
  int threads_;
  std::unique_ptr<float, AlignedDelete> workspace_;
};

}  // namespace

void decode_attention(const DecodeAttentionArgs& args) {
  if (args.batch == 0 || args.heads == 0 || args.query_tokens == 0) return;
  const DecodeKernel kernel = kernel_for(level());
  const Schedule schedule(args);
  const int64_t rows = args.heads / args.kv_heads * args.query_tokens;
#pragma omp parallel num_threads(schedule.threads()) if (schedule.threads() > 1)
  {
    const DecodeScratch scratch = schedule.scratch(omp_get_thread_num());
#pragma omp for schedule(dynamic, schedule.chunk())
    for (int64_t i = 0; i < schedule.items(); ++i) kernel(args, schedule.item(i), scratch);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < args.batch * args.kv_heads * rows; ++i) {
      schedule.merge(i / (args.kv_heads * rows), i / rows % args.kv_heads, i % rows);
    }
  }
}

}  // namespace adaptive::cpu
