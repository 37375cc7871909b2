// What the kernels of decode_attention share: how a problem is cut into thread blocks, the ring of
// key and value tiles in shared memory, and how a row of results leaves a block. See README.md.

#pragma once

#include <cstdint>
#include <limits>

#include "../decode_attention.h"
#include "../simt/simt.h"

namespace adaptive::cuda {

inline constexpr int kLanes = 32;
inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * kLanes;
inline constexpr int kTileRows = 16;  // query rows of a tensor-core tile
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// How a problem is cut. It follows from sizes and the device alone, never from data on the device,
/// so that nothing waits for the GPU and a captured graph stays valid for every content.
struct Plan {
  int padded_head_dim;  // columns in shared memory and registers
  int row_tiles;        // tiles of 16 query rows in a block: 1, 2 or 4
  int row_blocks;       // blocks that read the same keys for different query rows
  int splits;           // blocks along the keys
  int tile_keys;        // keys of a stage of the ring
  int stages;           // 2..4
  int shared_bytes;
};

/// The argument of every kernel. A *row* is a query of a KV head: row r of KV head h is token
/// r % query_tokens of head h * group + r / query_tokens.
struct Problem {
  DecodeAttentionArgs args;
  Plan plan;
  bool wide;           // key and value rows start on 16-byte boundaries
  float* partial_out;  // [batch, heads, query_tokens, splits, head_dim], not divided by the sum
  float* partial_max;  // [batch, heads, query_tokens, splits]
  float* partial_sum;  // [batch, heads, query_tokens, splits]; 0: no keys, partial_out not written
};

/// Launch the tensor-core kernel of one element type.
void attend_float16(const Problem& p, dim3 grid, Stream stream);
void attend_bfloat16(const Problem& p, dim3 grid, Stream stream);

/// The share of one thread block: some rows of a KV head against keys [begin, end).
struct Share {
  int64_t batch, kv_head;
  int split;
  int first_row, rows;
  int length;
  int begin, end;
  bool valid;  // the length lies in 0..capacity

  __device__ explicit Share(const Problem& p) {
    const DecodeAttentionArgs& a = p.args;
    const int row_block = blockIdx.x % p.plan.row_blocks;
    unsigned rest = blockIdx.x / p.plan.row_blocks;
    split = rest % p.plan.splits;
    rest /= p.plan.splits;
    kv_head = rest % a.kv_heads;
    batch = rest / a.kv_heads;

    const int block_rows = p.plan.row_tiles * kTileRows;
    const int all_rows = static_cast<int>(a.heads / a.kv_heads * a.query_tokens);
    first_row = row_block * block_rows;
    rows = min(block_rows, all_rows - first_row);

    length = a.lengths ? a.lengths[batch] : static_cast<int>(a.capacity);
    valid = length >= 0 && length <= a.capacity;
    const int64_t tiles = valid ? (length + p.plan.tile_keys - 1) / p.plan.tile_keys : 0;
    begin = static_cast<int>(tiles * split / p.plan.splits) * p.plan.tile_keys;
    end = static_cast<int>(tiles * (split + 1) / p.plan.splits) * p.plan.tile_keys;
    end = min(end, valid ? length : 0);
  }

  __device__ int64_t head(const DecodeAttentionArgs& a, int row) const {
    return kv_head * (a.heads / a.kv_heads) + (first_row + row) / a.query_tokens;
  }
  __device__ int64_t token(const DecodeAttentionArgs& a, int row) const {
    return (first_row + row) % a.query_tokens;
  }
  /// The number of leading keys that causality and the length admit; 0 for rows that only pad.
  __device__ int limit(const DecodeAttentionArgs& a, int row) const {
    if (row >= rows) return 0;
    return a.causal ? length - static_cast<int>(a.query_tokens - 1 - token(a, row)) : length;
  }
};

/// The mask as one row of queries sees it.
struct MaskRow {
  const void* base;  // null: no mask
  int64_t offset;

  __device__ MaskRow(const DecodeAttentionArgs& a, const Share& share, int row)
      : base(row < share.rows ? a.mask : nullptr),
        offset(share.batch * a.mask_stride[0] + share.head(a, row) * a.mask_stride[1] +
               share.token(a, row) * a.mask_stride[2]) {}

  /// What is added to the score of `key`: the mask's value; 0 or -inf for a bool mask.
  __device__ __forceinline__ float operator()(const DecodeAttentionArgs& a, int key) const {
    if (!base) return 0.0f;
    const int64_t at = offset + key * a.mask_stride[3];
    if (a.mask_add) return static_cast<const float*>(base)[at];
    return static_cast<const uint8_t*>(base)[at] ? 0.0f : -kInfinity;
  }
};

/// softcap(scale * dot)
__device__ __forceinline__ float score(const DecodeAttentionArgs& a, float dot) {
  const float scaled = dot * a.scale;
  return a.softcap > 0.0f ? a.softcap * tanhf(scaled / a.softcap) : scaled;
}

/// exp(x - max), where max = -inf stands for "nothing seen yet" and x <= max.
__device__ __forceinline__ float weight(float x, float max) {
  return __expf(x - (max == -kInfinity ? 0.0f : max));
}

/// Stages of key and value tiles in shared memory, filled ahead of their use by cp.async.
/// Rows are D elements and 16 bytes long: the 16 bytes spread the rows over the banks, so that
/// eight rows read at the same column (ldmatrix) do not collide. Everything not loaded is zero.
template <class T, int D>
struct Ring {
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kStride = D + kVector;

  T* shared;  // [stages, 2, tile_keys, kStride]
  const T* key;
  const T* value;

  __device__ Ring(const Problem& p, const Share& share, T* shared)
      : shared(shared),
        key(static_cast<const T*>(p.args.key) + share.batch * p.args.key_stride[0] +
            share.kv_head * p.args.key_stride[1]),
        value(static_cast<const T*>(p.args.value) + share.batch * p.args.value_stride[0] +
              share.kv_head * p.args.value_stride[1]) {}

  __device__ T* keys(const Plan& plan, int stage) const {
    return shared + stage * 2 * plan.tile_keys * kStride;
  }
  __device__ T* values(const Plan& plan, int stage) const {
    return keys(plan, stage) + plan.tile_keys * kStride;
  }

  /// Starts one group of copies: the keys and values from `first` on that lie before share.end.
  __device__ __forceinline__ void load(const Problem& p, const Share& share, int stage,
                                       int first) const {
    if (first < share.end) {
      load_rows(p, share, keys(p.plan, stage), key, p.args.key_stride[2], first);
      load_rows(p, share, values(p.plan, stage), value, p.args.value_stride[2], first);
    }
    simt::cp_async_commit();
  }

  /// Waits for the oldest stage, with stages - 1 groups in flight. A barrier must follow.
  __device__ static void wait(const Plan& plan) {
    switch (plan.stages) {
      case 2: return simt::cp_async_wait<0>();
      case 3: return simt::cp_async_wait<1>();
      default: return simt::cp_async_wait<2>();
    }
  }

 private:
  __device__ __forceinline__ static void load_rows(const Problem& p, const Share& share, T* to,
                                                   const T* from, int64_t stride, int first) {
    constexpr int kVectors = D / kVector;
#pragma unroll 4
    for (int i = threadIdx.x; i < p.plan.tile_keys * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * kVector;
      const bool valid = first + row < share.end && column < p.args.head_dim;
      T* target = to + row * kStride + column;
      const T* source = valid ? from + (first + row) * stride + column : from;
      if (p.wide) {
        simt::cp_async16(target, source, valid);
      } else {
        for (int j = 0; j < kVector; ++j) target[j] = valid ? source[j] : T{};
      }
    }
  }
};

/// One warp writes one row: `value(column)` over `sum`, or both to the workspace.
template <class Value>
__device__ void write_row(const Problem& p, const Share& share, int row, float max, float sum,
                          Value value) {
  const DecodeAttentionArgs& a = p.args;
  const int lane = threadIdx.x % kLanes;
  const int64_t head = share.head(a, row), token = share.token(a, row);
  const int64_t flat = (share.batch * a.heads + head) * a.query_tokens + token;
  if (p.plan.splits > 1) {
    const int64_t part = flat * p.plan.splits + share.split;
    if (lane == 0) p.partial_max[part] = max;
    if (lane == 0) p.partial_sum[part] = sum;
    if (sum == 0.0f) return;
    for (int c = lane; c < a.head_dim; c += kLanes) {
      p.partial_out[part * a.head_dim + c] = value(c);
    }
    return;
  }
  float* out =
      a.out + share.batch * a.out_stride[0] + head * a.out_stride[1] + token * a.out_stride[2];
  for (int c = lane; c < a.head_dim; c += kLanes) out[c] = sum == 0.0f ? 0.0f : value(c) / sum;
  if (lane == 0) a.lse[flat] = sum == 0.0f ? -kInfinity : max + logf(sum);
}

/// The rows of a block without keys, NaN where the length is out of range.
__device__ inline void write_empty_rows(const Problem& p, const Share& share) {
  const float max = share.valid ? -kInfinity : kNaN, sum = share.valid ? 0.0f : kNaN;
  for (int row = threadIdx.x / kLanes; row < share.rows; row += kWarps) {
    write_row(p, share, row, max, sum, [sum](int) { return sum; });
  }
}

/// Merges what `groups` groups of warps found for the same rows, and writes the rows.
/// out: [groups, row_tiles * 16, stride]; max, sum: [groups, row_tiles * 16], in shared memory.
__device__ inline void write_rows(const Problem& p, const Share& share, int groups,
                                  const float* out, int stride, const float* max,
                                  const float* sum) {
  const int block_rows = p.plan.row_tiles * kTileRows;
  for (int row = threadIdx.x / kLanes; row < share.rows; row += kWarps) {
    float top = -kInfinity, total = 0.0f, factor[kWarps];
    for (int g = 0; g < groups; ++g) top = fmaxf(top, max[g * block_rows + row]);
#pragma unroll
    for (int g = 0; g < kWarps; ++g) {
      factor[g] = g < groups ? weight(max[g * block_rows + row], top) : 0.0f;
      if (g < groups) total += factor[g] * sum[g * block_rows + row];
    }
    write_row(p, share, row, top, total, [&](int column) {
      float value = 0.0f;
#pragma unroll
      for (int g = 0; g < kWarps; ++g) {
        if (g < groups) value += factor[g] * out[(g * block_rows + row) * stride + column];
      }
      return value;
    });
  }
}

}  // namespace adaptive::cuda
