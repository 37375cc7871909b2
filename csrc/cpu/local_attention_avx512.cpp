// local_attention's kernel for AVX-512 (F, BW, VL, DQ).

#include "cpu/local_attention_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

void local_item_avx512(const LocalAttentionArgs& args, const LocalItem& item,
                       const LocalScratch& scratch) {
  local_item<SimdAvx512>(args, item, scratch);
}

}  // namespace adaptive::cpu
