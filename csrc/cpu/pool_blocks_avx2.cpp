// pool_blocks' kernel for AVX2, FMA and F16C.

#include "cpu/pool_blocks_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

void pool_item_avx2(const PoolBlocksArgs& args, const PoolItem& item) {
  pool_item<SimdAvx2>(args, item);
}

}  // namespace adaptive::cpu
