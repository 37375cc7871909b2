// The plan of an attention problem, and the kernel that merges its splits: see plan.h.

#include "plan.h"

#include <stdexcept>
#include <string>

#include "decode_attention_fma.cuh"
#include "gather_attention.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kMergeWarps = 8;
constexpr int kMaxColumns = 256 / kLanes;  // of a lane

/// One block merges the splits of one row: each warp takes some splits, then warp 0 adds up.
__global__ void __launch_bounds__(kMergeWarps* kLanes)
    merge_rows(const __grid_constant__ Problem p) {
  const DecodeAttentionArgs& a = p.args;
  const int splits = p.plan.splits, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t row = blockIdx.x;
  const float* maxima = p.partial_max + row * splits;
  const float* sums = p.partial_sum + row * splits;

  float top = -kInfinity, total = 0.0f;
  for (int s = lane; s < splits; s += kLanes) top = fmaxf(top, maxima[s]);
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2)
    top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
  for (int s = lane; s < splits; s += kLanes) total += weight(maxima[s], top) * sums[s];
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) total += __shfl_xor_sync(~0u, total, lanes);

  if (threadIdx.x == 0) a.lse[row] = total == 0.0f ? -kInfinity : top + logf(total);
  if (!a.out) return;

  float out[kMaxColumns] = {};
#pragma unroll 4
  for (int s = warp; s < splits; s += kMergeWarps) {
    if (sums[s] == 0.0f) continue;
    const float factor = weight(maxima[s], top);
    const float* partial = p.partial_out + (row * splits + s) * a.head_dim;
#pragma unroll
    for (int c = 0; c < kMaxColumns; ++c) {
      if (c * kLanes + lane < a.head_dim) out[c] += factor * partial[c * kLanes + lane];
    }
  }

  SHARED(float[kMergeWarps][kMaxColumns * kLanes], shared);
#pragma unroll
  for (int c = 0; c < kMaxColumns; ++c) shared[warp][c * kLanes + lane] = out[c];
  __syncthreads();
  const int64_t token = row % a.query_tokens, head = row / a.query_tokens % a.heads;
  float* to = a.out + row / a.query_tokens / a.heads * a.out_stride[0] + head * a.out_stride[1] +
              token * a.out_stride[2];
  for (int c = threadIdx.x; c < a.head_dim; c += kMergeWarps * kLanes) {
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kMergeWarps; ++w) value += shared[w][c];
    to[c] = total == 0.0f ? 0.0f : value / total;
  }
}

int padded_head_dim(const char* op, const DecodeAttentionArgs& a) {
  if (a.head_dim < 8 || a.head_dim > 256 || a.head_dim % 8) {
    refuse(op, "head_dim must be a multiple of 8 up to 256, got " + std::to_string(a.head_dim));
  }
  if (a.head_dim <= 64) return 64;
  return a.head_dim <= 128 ? 128 : 256;
}

/// The cheapest number of splits under this model: blocks run in waves of `slots`, and a block
/// costs its tiles of keys and, for filling the ring and writing its rows, about two tiles more.
int choose_splits(int64_t blocks, int64_t tiles, int64_t slots) {
  constexpr int64_t kOverheadTiles = 2, kMostSplits = 512, kMostWaves = 16;
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    // The most splits that these waves have room for, then the fewest with blocks as short.
    const int64_t room = max(int64_t{1}, min(min(tiles, kMostSplits), waves * slots / blocks));
    const int64_t tiles_each = max(int64_t{1}, (tiles + room - 1) / room);
    const int64_t splits = max(int64_t{1}, (tiles + tiles_each - 1) / tiles_each);
    const int64_t used_waves = (blocks * splits + slots - 1) / slots;
    const int64_t cost = used_waves * (tiles_each + kOverheadTiles);
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return static_cast<int>(best);
}

/// Fits the ring: as many stages as let two blocks share a multiprocessor, and at least two.
Plan make_plan(const Work& work, const DecodeAttentionArgs& a) {
  const simt::Device& device = simt::current_device();
  const bool single = a.dtype == DType::kFloat32;
  Plan plan{};
  plan.padded_head_dim = padded_head_dim(work.op, a);
  const int row_bytes = plan.padded_head_dim * (single ? 4 : 2) + 16;

  const int64_t rows = a.heads / a.kv_heads * a.query_tokens;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  plan.row_tiles = single || tiles == 1 ? 1 : tiles == 2 ? 2 : 4;

  // Beside the ring: the query rows; attend_fma also keeps a tile of weights and its softmax.
  const int reserved_bytes = 1024;  // per block, by the runtime
  const int list_bytes = work.listed ? ListedKeys::kSharedBytes : 0;
  const auto fixed_bytes = [&] {
    return list_bytes +
           (single ? fma_tile_bytes(plan.padded_head_dim) : plan.row_tiles * kTileRows * row_bytes);
  };
  plan.tile_keys = single ? fma_tile_keys(plan.padded_head_dim) : 64;
  const auto stage_bytes = [&] { return (work.values ? 2 : 1) * plan.tile_keys * row_bytes; };
  const auto fits = [&] {
    return single || fixed_bytes() + 2 * stage_bytes() <= device.shared_bytes_per_block;
  };
  if (!fits()) plan.tile_keys = 32;
  if (!fits()) plan.row_tiles = min(plan.row_tiles, 2);
  plan.row_blocks = static_cast<int>((tiles + plan.row_tiles - 1) / plan.row_tiles);

  const int half = device.shared_bytes_per_multiprocessor / 2 - reserved_bytes - fixed_bytes();
  plan.stages = half / stage_bytes();
  if (plan.stages < 2)
    plan.stages = (device.shared_bytes_per_block - fixed_bytes()) / stage_bytes();
  plan.stages = min(max(plan.stages, 2), 4);
  plan.shared_bytes = fixed_bytes() + plan.stages * stage_bytes();

  const int resident =
      device.shared_bytes_per_multiprocessor / (plan.shared_bytes + reserved_bytes);
  const int64_t slots = int64_t{device.multiprocessors} * min(max(resident, 1), 2);
  const auto tiles_of = [&](int64_t keys) { return (keys + plan.tile_keys - 1) / plan.tile_keys; };
  plan.splits = choose_splits(a.batch * a.kv_heads * plan.row_blocks,
                              tiles_of(work.keys) + tiles_of(work.extra), slots);
  return plan;
}

int64_t rows_of(const DecodeAttentionArgs& a) { return a.batch * a.heads * a.query_tokens; }

int64_t partial_floats(const Work& work, const DecodeAttentionArgs& a) {
  return work.values ? a.head_dim + 2 : 2;
}

int64_t workspace_bytes(const Work& work, const DecodeAttentionArgs& a, const Plan& plan) {
  const int64_t partial_bytes = plan.splits * partial_floats(work, a) * int64_t{4};
  return rows_of(a) * (work.row_bytes + (plan.splits == 1 ? 0 : partial_bytes));
}

}  // namespace

bool is_empty(const DecodeAttentionArgs& a) {
  return a.batch == 0 || a.heads == 0 || a.query_tokens == 0;
}

void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("adaptive::") + op + ": " + what);
}

bool is_wide(const void* base, const int64_t (&stride)[3], DType dtype) {
  if (reinterpret_cast<uintptr_t>(base) % 16) return false;
  for (const int64_t s : stride) {
    if (s * (dtype == DType::kFloat32 ? 4 : 2) % 16) return false;
  }
  return true;
}

int64_t workspace_bytes(const Work& work, const DecodeAttentionArgs& args) {
  return is_empty(args) ? 0 : workspace_bytes(work, args, make_plan(work, args));
}

Problem make_problem(const Work& work, const DecodeAttentionArgs& args) {
  constexpr int64_t kMostKeys = int64_t{1} << 30;
  if (args.capacity > kMostKeys) {
    refuse(work.op, "capacity must be at most 2^30 on CUDA, got " + std::to_string(args.capacity));
  }
  Problem p{};
  p.args = args;
  p.plan = make_plan(work, args);
  p.wide = is_wide(args.key, args.key_stride, args.dtype) &&
           (!work.values || is_wide(args.value, args.value_stride, args.dtype));

  const int64_t rows = rows_of(args), wanted = workspace_bytes(work, args, p.plan);
  if (args.workspace_bytes < wanted) {
    refuse(work.op, "workspace must hold " + std::to_string(wanted) + " bytes, got " +
                        std::to_string(args.workspace_bytes));
  }
  p.partial_out =
      reinterpret_cast<float*>(static_cast<char*>(args.workspace) + rows * work.row_bytes);
  p.partial_max = p.partial_out + (work.values ? rows * p.plan.splits * args.head_dim : 0);
  p.partial_sum = p.partial_max + rows * p.plan.splits;

  const int64_t blocks = args.batch * args.kv_heads * p.plan.row_blocks * p.plan.splits;
  if (max(blocks, rows) > INT32_MAX) {
    refuse(work.op, "batch must be smaller: too many thread blocks");
  }
  if (args.dtype > DType::kBfloat16) {
    refuse(work.op, "query must be float32, float16 or bfloat16");
  }
  return p;
}

dim3 attend_grid(const Problem& p) {
  const int64_t heads = p.args.batch * p.args.kv_heads;
  return dim3(static_cast<unsigned>(heads * p.plan.row_blocks * p.plan.splits));
}

void merge_splits(const char* op, const Problem& p, Stream stream) {
  if (p.plan.splits == 1) return;
  const dim3 grid(static_cast<unsigned>(rows_of(p.args)));
  simt::launch<merge_rows>(op, grid, dim3(kMergeWarps * kLanes), 0, stream, p);
}

}  // namespace adaptive::cuda
