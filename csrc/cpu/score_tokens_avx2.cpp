// The reduction of score_tokens for AVX2, FMA and F16C.

#include "cpu/score_tokens_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

void reduce_item_avx2(const ReduceItem& item) { reduce_item<SimdAvx2>(item); }

}  // namespace adaptive::cpu
