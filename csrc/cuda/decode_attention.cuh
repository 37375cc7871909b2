// What the attention kernels share: how a problem is cut into thread blocks, which keys a row sees,
// and how a row of results leaves a block. See README.md.
//
// A kernel is compiled for a kind of problem `P`, and does what that asks for: P::Keys says where
// the block's keys lie (key_ring.cuh, gather_attention.cuh), P::kValues whether there are values to
// add up, P::kLogits whether every score is written out as well (score_tokens.cuh).

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

class AllKeys;

/// The argument of the kernels of decode_attention. A *row* is a query of a KV head: row r of KV
/// head h is token r % query_tokens of head h * group + r / query_tokens.
struct Problem {
  using Keys = AllKeys;
  static constexpr bool kValues = true, kLogits = false;

  DecodeAttentionArgs args;
  Plan plan;
  bool wide;           // key and value rows start on 16-byte boundaries
  float* partial_out;  // [batch, heads, query_tokens, splits, head_dim], not divided by the sum
  float* partial_max;  // [batch, heads, query_tokens, splits]
  float* partial_sum;  // [batch, heads, query_tokens, splits]; 0: no keys, partial_out not written
};

/// Launches the tensor-core kernels, for the 2-byte element types.
void attend_half(const char* op, const Problem& p, Stream stream);

/// The share of one thread block: some rows of a KV head against *slots* [begin, end). P::Keys says
/// which key lies in a slot; in decode_attention, slot s is key s.
struct Share {
  int batch, kv_head;
  int cache_row;  // of key and value
  int split;
  int first_row, rows;
  int length;
  int listed;  // slots of chosen keys; those of extra tokens begin at the next tile
  int begin, end;
  // The length lies in 0..capacity, the count in 0..chosen, and the cache has the row.
  bool valid;

  template <class P>
  __device__ explicit Share(const P& p) {
    const DecodeAttentionArgs& a = p.args;
    const unsigned kv_heads = static_cast<unsigned>(a.kv_heads);
    unsigned rest = blockIdx.x;
    const int row_block = rest % p.plan.row_blocks;
    rest /= p.plan.row_blocks;
    split = rest % p.plan.splits;
    rest /= p.plan.splits;
    kv_head = rest % kv_heads;
    batch = rest / kv_heads;

    const int block_rows = p.plan.row_tiles * kTileRows;
    const int all_rows =
        static_cast<int>(a.heads) / static_cast<int>(kv_heads) * static_cast<int>(a.query_tokens);
    first_row = row_block * block_rows;
    rows = min(block_rows, all_rows - first_row);

    length = a.lengths ? a.lengths[batch] : static_cast<int>(a.capacity);
    valid = length >= 0 && length <= a.capacity;
    cache_row = batch;
    if constexpr (P::Keys::kCacheRows) {
      if (a.cache_rows) {
        const int64_t row = a.cache_rows[batch];
        valid = valid && row >= 0 && row < a.cache_batch;
        cache_row = static_cast<int>(row);
      }
    }
    const int slots = P::Keys::slots(p, *this);
    const int64_t tiles = valid ? (slots + p.plan.tile_keys - 1) / p.plan.tile_keys : 0;
    begin = static_cast<int>(tiles * split / p.plan.splits) * p.plan.tile_keys;
    end = static_cast<int>(tiles * (split + 1) / p.plan.splits) * p.plan.tile_keys;
    end = min(end, valid ? slots : 0);
  }
};

/// Where one row of a block lies in query, mask and out.
struct Row {
  int64_t batch, head;
  int token;
  bool exists;  // the last rows of a block may only fill its tile

  __device__ Row(const DecodeAttentionArgs& a, const Share& share, int row) {
    const int tokens = static_cast<int>(a.query_tokens);
    const int group = static_cast<int>(a.heads) / static_cast<int>(a.kv_heads);
    const int index = share.first_row + row;
    batch = share.batch;
    head = share.kv_head * group + index / tokens;
    token = index % tokens;
    exists = row < share.rows;
  }

  __device__ int64_t offset(const int64_t (&stride)[3]) const {
    return batch * stride[0] + head * stride[1] + token * stride[2];
  }
  /// Index among all rows, [batch, heads, query_tokens].
  __device__ int64_t index(const DecodeAttentionArgs& a) const {
    return (batch * a.heads + head) * a.query_tokens + token;
  }
};

/// A score with what is added to it; -inf leaves the key out, whatever its score.
__device__ __forceinline__ float add_bias(float score, float bias) {
  return bias == -kInfinity ? bias : score + bias;
}

/// Which keys a row sees, and what the mask adds to their scores.
struct Sight {
  int limit;         // keys from here on are too late, by causality or length
  const char* mask;  // of key 0

  __device__ Sight() {}
  __device__ Sight(const DecodeAttentionArgs& a, const Share& share, const Row& row) {
    limit = share.length;
    if (a.causal) limit += row.token + 1 - static_cast<int>(a.query_tokens);
    if (!row.exists) limit = 0;
    const int64_t element_bytes = a.mask_add ? 4 : 1;
    const int64_t offset =
        row.batch * a.mask_stride[0] + row.head * a.mask_stride[1] + row.token * a.mask_stride[2];
    mask = a.mask ? static_cast<const char*>(a.mask) + offset * element_bytes : nullptr;
  }

  /// The score with the mask added; -inf where the row does not see the key.
  __device__ __forceinline__ float operator()(const DecodeAttentionArgs& a, float score,
                                              int key) const {
    if (key >= limit) return -kInfinity;
    return masked(a, score, key);
  }
  /// The score with the mask added.
  __device__ __forceinline__ float masked(const DecodeAttentionArgs& a, float score,
                                          int key) const {
    if (!a.mask) return score;
    const char* at = mask + key * a.mask_stride[3] * (a.mask_add ? 4 : 1);
    if (a.mask_add) return add_bias(score, *reinterpret_cast<const float*>(at));
    return *at ? score : -kInfinity;
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

/// One warp writes one row: `value(column)` over `sum`, or both to the workspace.
template <class P, class Value>
__device__ void write_row(const P& p, const Row& row, int split, float max, float sum,
                          Value value) {
  const DecodeAttentionArgs& a = p.args;
  const int lane = threadIdx.x % kLanes;
  if (p.plan.splits > 1) {
    const int64_t part = row.index(a) * p.plan.splits + split;
    if (lane == 0) p.partial_max[part] = max;
    if (lane == 0) p.partial_sum[part] = sum;
    if (sum == 0.0f || !P::kValues) return;
    float* out = p.partial_out + part * a.head_dim;
    for (int c = lane; c < a.head_dim; c += kLanes) out[c] = value(c);
    return;
  }
  if constexpr (P::kValues) {
    float* out = a.out + row.offset(a.out_stride);
    for (int c = lane; c < a.head_dim; c += kLanes) out[c] = sum == 0.0f ? 0.0f : value(c) / sum;
  }
  if (lane == 0) a.lse[row.index(a)] = sum == 0.0f ? -kInfinity : max + logf(sum);
}

/// The rows of a block without keys, NaN where the length or the count is out of range.
template <class P>
__device__ void write_empty_rows(const P& p, const Share& share) {
  const float max = share.valid ? -kInfinity : kNaN, sum = share.valid ? 0.0f : kNaN;
  for (int row = threadIdx.x / kLanes; row < share.rows; row += kWarps) {
    write_row(p, Row(p.args, share, row), share.split, max, sum, [sum](int) { return sum; });
  }
}

/// Merges what `groups` groups of warps found for the same rows, and writes the rows; NaN if the
/// keys were not `good`.
/// out: [groups, row_tiles * 16, stride]; max, sum: [groups, row_tiles * 16], in shared memory.
template <class P>
__device__ void write_rows(const P& p, const Share& share, bool good, int groups, const float* out,
                           int stride, const float* max, const float* sum) {
  const int block_rows = p.plan.row_tiles * kTileRows;
  for (int row = threadIdx.x / kLanes; row < share.rows; row += kWarps) {
    float top = -kInfinity, total = 0.0f;
    for (int r = row; r < groups * block_rows; r += block_rows) top = fmaxf(top, max[r]);
    for (int r = row; r < groups * block_rows; r += block_rows) {
      total += weight(max[r], top) * sum[r];
    }
    if (!good) total = kNaN;
    write_row(p, Row(p.args, share, row), share.split, top, total, [&](int column) {
      float value = 0.0f;
      for (int r = row; r < groups * block_rows; r += block_rows) {
        value += weight(max[r], top) * out[r * stride + column];
      }
      return value;
    });
  }
}

}  // namespace adaptive::cuda
