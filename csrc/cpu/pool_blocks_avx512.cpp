// pool_blocks' kernel for AVX-512 (F, BW, VL, DQ).

#include "cpu/pool_blocks_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

void pool_item_avx512(const PoolBlocksArgs& args, const PoolItem& item) {
  pool_item<SimdAvx512>(args, item);
}

}  // namespace adaptive::cpu
