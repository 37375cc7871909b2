// gather_attention on CUDA: its launches, and its kernels for float32.

#include "gather_attention.cuh"

#include <bit>
#include <cstring>
#include <string>

#include "decode_attention_fma.cuh"
#include "plan.h"

namespace adaptive::cuda {
namespace {

constexpr int64_t kMostExtra = 64, kMostPageSize = 64, kMostSlots = int64_t{1} << 30;

Work work_of(const GatherAttentionArgs& args) {
  const auto refuse_size = [](const char* what, int64_t got) {
    refuse("gather_attention", what + std::to_string(got));
  };
  const int64_t page = args.page_size;
  if (page < 1 || page > kMostPageSize || (page & (page - 1)) != 0) {
    refuse_size("page_size must be a power of two up to 64, got ", page);
  }
  if (args.extra < 0 || args.extra > kMostExtra) {
    refuse_size("extra_key must have at most 64 tokens, got ", args.extra);
  }
  if (args.chosen > kMostSlots / page) {
    refuse_size("indices must name at most 2^30 tokens on CUDA, got entries: ", args.chosen);
  }
  return {
      .op = "gather_attention", .keys = args.chosen * page, .extra = args.extra, .listed = true};
}

}  // namespace

int64_t gather_attention_workspace_bytes(const GatherAttentionArgs& args) {
  return workspace_bytes(work_of(args), args.attention);
}

void gather_attention(const GatherAttentionArgs& args, Stream stream) {
  const DecodeAttentionArgs& a = args.attention;
  if (is_empty(a)) return;
  const Work work = work_of(args);
  GatherProblem p{make_problem(work, a)};
  p.wide =
      p.wide && (args.extra == 0 || (is_wide(args.extra_key, args.extra_key_stride, a.dtype) &&
                                     is_wide(args.extra_value, args.extra_value_stride, a.dtype)));
  p.indices = args.indices;
  p.counts = args.counts;
  p.chosen = static_cast<int>(args.chosen);
  p.page_bits = std::countr_zero(static_cast<uint64_t>(args.page_size));
  p.pages = static_cast<int>((a.capacity + args.page_size - 1) / args.page_size);
  p.extra = static_cast<int>(args.extra);
  p.extra_key = args.extra_key;
  p.extra_value = args.extra_value;
  p.extra_bias = args.extra_bias;
  std::memcpy(p.indices_stride, args.indices_stride, sizeof p.indices_stride);
  std::memcpy(p.counts_stride, args.counts_stride, sizeof p.counts_stride);
  std::memcpy(p.extra_key_stride, args.extra_key_stride, sizeof p.extra_key_stride);
  std::memcpy(p.extra_value_stride, args.extra_value_stride, sizeof p.extra_value_stride);
  std::memcpy(p.extra_bias_stride, args.extra_bias_stride, sizeof p.extra_bias_stride);
  attend(work.op, p, stream);
  merge_splits(work.op, p, stream);
}

}  // namespace adaptive::cuda
