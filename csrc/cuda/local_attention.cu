// local_attention and block_sparse_attention on CUDA: how they are cut into blocks, their launch,
// and the kernels for float32.

#include <bit>
#include <string>

#include "local_attention_kernel.cuh"
#include "plan.h"

namespace adaptive::cuda {
namespace {

constexpr const char* kOp = "local_attention";

/// Bytes of shared memory that a block of so many warps takes.
int shared_bytes(const LocalAttentionArgs& a, int warps) {
  int bytes = 0;
  with_local_head_dim(a, [&]<int D>() {
    const bool single = a.dtype == DType::kFloat32;
    bytes = single ? LocalShape<float, D>::shared_bytes(warps)
                   : LocalShape<simt::bfloat16, D>::shared_bytes(warps);
  });
  return bytes;
}

/// Cuts the heads of a group and the query tokens into blocks, and sets `warps`.
///
/// As many heads of a group as fit share the keys that their block loads: all of them see the same,
/// unless windows or lists are per head. What is left of eight warps goes to more tokens.
void cut(LocalProblem& p, int& warps) {
  const LocalAttentionArgs& a = p.args;
  const simt::Device& device = simt::current_device();
  int most = kMostWarps;
  while (most > 1 && shared_bytes(a, most) > device.shared_bytes_per_block) --most;

  const int group = static_cast<int>(a.heads / a.kv_heads);
  p.fold = 1;
  if (!a.windows && (!a.counts || a.lists == a.kv_heads)) {
    for (int heads = 2; heads <= min(most, group); ++heads) {
      if (group % heads == 0) p.fold = heads;
    }
  }
  int64_t tiles = std::bit_floor(static_cast<unsigned>(most / p.fold));
  if (a.counts) tiles = min(tiles, a.block_size / kStep);  // the tokens of a block share a list
  const auto blocks = [&] {
    p.tile_tokens = static_cast<int>(tiles) * kStep;
    p.tiles = static_cast<int>((a.query_tokens + p.tile_tokens - 1) / p.tile_tokens);
    return a.batch * (a.heads / p.fold) * p.tiles;
  };
  while (tiles > 1 && blocks() < device.multiprocessors) tiles /= 2;
  if (blocks() > INT32_MAX) refuse(kOp, "batch must be smaller: too many thread blocks");
  warps = static_cast<int>(tiles) * p.fold;
}

LocalProblem make_problem(const LocalAttentionArgs& a) {
  constexpr int64_t kMostKeys = int64_t{1} << 30;
  constexpr float kLog2E = 1.44269504f;
  if (a.head_dim < 8 || a.head_dim > 256 || a.head_dim % 8) {
    refuse(kOp, "head_dim must be a multiple of 8 up to 256, got " + std::to_string(a.head_dim));
  }
  if (a.tokens > kMostKeys) {
    refuse(kOp, "key must have at most 2^30 tokens on CUDA, got " + std::to_string(a.tokens));
  }
  if (a.dtype > DType::kBfloat16) refuse(kOp, "query must be float32, float16 or bfloat16");
  LocalProblem p{};
  p.args = a;
  p.list_bits = a.counts ? std::countr_zero(static_cast<uint64_t>(a.block_size / kStep)) : 0;
  p.factor = a.softcap > 0.0f ? a.scale : a.scale * kLog2E;
  p.cap = a.softcap * kLog2E;
  p.wide = is_wide(a.key, a.key_stride, a.dtype) && is_wide(a.value, a.value_stride, a.dtype);
  p.wide_query = is_wide(a.query, a.query_stride, a.dtype);
  p.wide_out = is_wide(a.out, a.out_stride, a.dtype);
  return p;
}

}  // namespace

void local_attention(const LocalAttentionArgs& args, Stream stream) {
  if (args.batch == 0 || args.heads == 0 || args.query_tokens == 0) return;
  LocalProblem p = make_problem(args);
  int warps = 0;
  cut(p, warps);
  const int64_t blocks = args.batch * (args.heads / p.fold) * p.tiles;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (args.dtype != DType::kFloat32) return attend_local_half(p, grid, warps, stream);
  with_local_head_dim(args, [&]<int D>() { launch_local<float, D>(p, grid, warps, stream); });
}

}  // namespace adaptive::cuda
