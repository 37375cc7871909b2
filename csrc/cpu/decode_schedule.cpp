// The schedule of decode attention and its kin, and the choice of the instruction set.

#include "cpu/decode_schedule.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/level.h"

namespace adaptive::cpu {
namespace {

constexpr int64_t kItemsPerThread = 8;                 // taken at a time: total / (threads * this)
constexpr int64_t kBytesPerThread = int64_t{1} << 17;  // below, waking a thread costs more
constexpr int64_t kAlignedFloats = 64 / sizeof(float);

}  // namespace

AlignedFloats aligned_floats(int64_t count) {
  return AlignedFloats(static_cast<float*>(
      ::operator new(static_cast<size_t>(count) * sizeof(float), AlignedDelete::kAlignment)));
}

int useful_threads(int64_t pieces, int64_t bytes) {
  const int64_t useful = std::min(pieces, bytes / kBytesPerThread);
  return static_cast<int>(std::clamp<int64_t>(useful, 1, omp_get_max_threads()));
}

DecodeKernel decode_kernel() {
#if defined(__x86_64__)
  if (level() == Level::kAvx512Bf16) return &decode_item_avx512bf16;
#endif
  return ADAPTIVE_AT_LEVEL(decode_item);
}

ReduceKernel reduce_kernel() { return ADAPTIVE_AT_LEVEL(reduce_item); }

SumKernel sum_kernel() { return ADAPTIVE_AT_LEVEL(sum_item); }

DecodeSchedule::DecodeSchedule(const DecodeAttentionArgs& args, const GatherAttentionArgs* list)
    : args_(args),
      list_(list),
      rows_(args.heads / args.kv_heads * args.query_tokens),
      result_floats_(round_up(rows_ * (args.head_dim + 2), kAlignedFloats)),
      padded_rows_(round_up(rows_, kTileRows)),
      width_(round_up(args.head_dim, kWidthStep)),
      scratch_floats_(round_up(padded_rows_ * (2 * width_ + kBlockKeys + 2), kAlignedFloats)) {
  const int64_t heads = args.batch * args.kv_heads;
  first_item_.reserve(heads + 1);
  first_item_.push_back(0);
  int64_t read = 0;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t count = keys(head);
    first_item_.push_back(first_item_.back() + std::max<int64_t>(1, (count - 1) / kItemKeys + 1));
    read += count;
  }
  const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t sides = args.value != nullptr ? 2 : 1;
  threads_ = useful_threads(items(), sides * read * args.head_dim * element_bytes);
  workspace_ = aligned_floats(items() * result_floats_ + threads_ * scratch_floats_);
}

void DecodeSchedule::keep_weights(Reduce reduce) {
  const int64_t heads = args_.batch * args_.kv_heads;
  logits_ = reduce == Reduce::kLogit;
  first_weight_.reserve(heads + 1);
  first_weight_.push_back(0);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t blocks = (keys(head) + kBlockKeys - 1) / kBlockKeys;
    first_weight_.push_back(first_weight_.back() + rows_ * blocks * (kBlockKeys + 1));
  }
  weights_ = aligned_floats(first_weight_.back());
}

WeightSink DecodeSchedule::sink(int64_t head) const {
  if (first_weight_.empty()) return {};
  float* weights = weights_.get() + first_weight_[head];
  const int64_t stride = round_up(keys(head), kBlockKeys);
  return {
      .weights = weights, .stride = stride, .maxima = weights + rows_ * stride, .logits = logits_};
}

void DecodeSchedule::run() const {
  const DecodeKernel kernel = decode_kernel();
  const int64_t chunk = std::max<int64_t>(1, items() / (threads_ * kItemsPerThread));
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
  {
    const DecodeScratch mine = scratch(omp_get_thread_num());
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < items(); ++i) kernel(args_, item(i), mine);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < args_.batch * args_.kv_heads * rows_; ++i) merge(i / rows_, i % rows_);
  }
}

int64_t DecodeSchedule::keys(int64_t head) const {
  const int64_t batch = head / args_.kv_heads;
  return list_ == nullptr ? length(batch) : listed_keys(*list_, batch, head % args_.kv_heads);
}

DecodeItem DecodeSchedule::item(int64_t index) const {
  const auto after = std::upper_bound(first_item_.begin(), first_item_.end(), index);
  const int64_t head = after - first_item_.begin() - 1;
  return part(head, index - first_item_[head]);
}

DecodeItem DecodeSchedule::part(int64_t head, int64_t within) const {
  const int64_t begin = within * kItemKeys;
  int64_t end = std::min(begin + kItemKeys, keys(head));
  if (list_ != nullptr && list_->extra > 0 && within + 1 == parts(head)) {
    end = round_up(end, kBlockKeys) + kBlockKeys;
  }
  float* result = workspace_.get() + (first_item_[head] + within) * result_floats_;
  return {.batch = head / args_.kv_heads,
          .kv_head = head % args_.kv_heads,
          .begin = begin,
          .end = end,
          .list = list_,
          .sink = sink(head),
          .acc = result,
          .max = result + rows_ * args_.head_dim,
          .sum = result + rows_ * (args_.head_dim + 1)};
}

DecodeScratch DecodeSchedule::scratch(int thread) const {
  float* start = workspace_.get() + items() * result_floats_ + thread * scratch_floats_;
  float* scores = start + 2 * padded_rows_ * width_;
  return {.query = start,
          .acc = start + padded_rows_ * width_,
          .scores = scores,
          .seen = reinterpret_cast<uint64_t*>(scores + padded_rows_ * kBlockKeys)};
}

// Writes the result of a query row of a (batch row, KV head) from its items.
void DecodeSchedule::merge(int64_t head, int64_t row) const {
  float max = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < parts(head); ++i) max = std::max(max, part(head, i).max[row]);
  const float shift = std::isinf(max) && max < 0 ? 0 : max;
  const int64_t batch = head / args_.kv_heads, group = args_.heads / args_.kv_heads;
  const int64_t query_head = head % args_.kv_heads * group + row / args_.query_tokens;
  float* out = args_.out == nullptr
                   ? nullptr
                   : args_.out + batch * args_.out_stride[0] + query_head * args_.out_stride[1] +
                         row % args_.query_tokens * args_.out_stride[2];
  const int64_t columns = out == nullptr ? 0 : args_.head_dim;
  float sum = 0;
  std::fill_n(out, columns, 0.0f);
  for (int64_t i = 0; i < parts(head); ++i) {
    const DecodeItem from = part(head, i);
    const float weight = std::exp(from.max[row] - shift);
    const float* acc = from.acc + row * args_.head_dim;
    sum += weight * from.sum[row];
    for (int64_t d = 0; d < columns; ++d) out[d] += weight * acc[d];
  }
  const float factor = sum == 0 ? 0 : 1 / sum;
  for (int64_t d = 0; d < columns; ++d) out[d] *= factor;
  args_.lse[head * rows_ + row] = max + std::log(sum);
}

}  // namespace adaptive::cpu
