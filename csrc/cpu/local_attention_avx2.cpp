// local_attention's kernel for AVX2, FMA and F16C.

#include "cpu/local_attention_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

void local_item_avx2(const LocalAttentionArgs& args, const LocalItem& item,
                     const LocalScratch& scratch) {
  local_item<SimdAvx2>(args, item, scratch);
}

}  // namespace adaptive::cpu
