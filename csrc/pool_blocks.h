// pool_blocks: the mean of the tokens of each block of queries or keys, read in place.
//
// Block n of a row is its tokens from n * block_size on, up to block_size of them. Tokens before
// the first or from the last offset of the row on do not count and are not read. A block without
// any token that counts gives zeros.

#pragma once

#include <cstdint>

#include "common.h"

namespace adaptive {

struct PoolBlocksArgs {
  const void* source;      // [batch, heads, tokens, head_dim], dtype, last contiguous
  const int32_t* offsets;  // [batch, cuts], ascending in 0..tokens; null: all tokens count
  float* means;            // [batch, heads, blocks, head_dim], contiguous

  DType dtype;  // float32, float16 or bfloat16

  int64_t batch;
  int64_t heads;
  int64_t tokens;      // at most 2^31 - 1
  int64_t head_dim;    // 32..256, a multiple of 8
  int64_t block_size;  // at least 1
  int64_t cuts;        // entries of a row of offsets, at least 2

  int64_t source_stride[3];  // batch, head, token
  int64_t offsets_stride;    // batch

  int64_t blocks() const { return (tokens + block_size - 1) / block_size; }
};

namespace cpu {

/// Runs on the threads that torch.set_num_threads allows.
void pool_blocks(const PoolBlocksArgs& args);

}  // namespace cpu

namespace cuda {

/// Enqueues on `stream` and returns at once; capture-safe; needs no workspace. Of offsets, only the
/// first and the last of a row are read: one out of range, or the last before the first, makes the
/// row's means NaN. Throws if a launch is refused.
void pool_blocks(const PoolBlocksArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
