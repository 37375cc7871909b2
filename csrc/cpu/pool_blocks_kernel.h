// What pool_blocks asks of the kernel of one instruction set. Included by every instruction set's
// file: nothing here may emit a symbol.

#pragma once

#include <cstdint>

#include "pool_blocks.h"

namespace adaptive::cpu {

/// Tokens [begin, end) of a (batch row, head), and where their mean goes; without any: zeros.
struct PoolItem {
  int64_t batch;
  int64_t head;
  int64_t begin;
  int64_t end;
  float* mean;  // [head_dim]
};

using PoolKernel = void (*)(const PoolBlocksArgs&, const PoolItem&);

void pool_item_base(const PoolBlocksArgs& args, const PoolItem& item);
void pool_item_avx2(const PoolBlocksArgs& args, const PoolItem& item);
void pool_item_avx512(const PoolBlocksArgs& args, const PoolItem& item);

}  // namespace adaptive::cpu
