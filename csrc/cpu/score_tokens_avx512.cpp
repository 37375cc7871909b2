// The reduction of score_tokens for AVX-512 (F, BW, VL, DQ).

#include "cpu/score_tokens_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

void reduce_item_avx512(const ReduceItem& item) { reduce_item<SimdAvx512>(item); }

}  // namespace adaptive::cpu
