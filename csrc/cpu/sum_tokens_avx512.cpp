// sum_tokens' kernel for AVX-512 (F, BW, VL, DQ).

#include "cpu/simd_avx512.h"
#include "cpu/sum_tokens_impl.h"

namespace adaptive::cpu {

void sum_item_avx512(const SumTokensArgs& args, const SumItem& item) {
  sum_item<SimdAvx512>(args, item);
}

}  // namespace adaptive::cpu
