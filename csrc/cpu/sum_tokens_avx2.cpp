// sum_tokens' kernel for AVX2, FMA and F16C.

#include "cpu/simd_avx2.h"
#include "cpu/sum_tokens_impl.h"

namespace adaptive::cpu {

void sum_item_avx2(const SumTokensArgs& args, const SumItem& item) {
  sum_item<SimdAvx2>(args, item);
}

}  // namespace adaptive::cpu
