// pool_blocks' kernel for the baseline of the architecture.

#include "cpu/pool_blocks_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

void pool_item_base(const PoolBlocksArgs& args, const PoolItem& item) {
  pool_item<SimdBase>(args, item);
}

}  // namespace adaptive::cpu
