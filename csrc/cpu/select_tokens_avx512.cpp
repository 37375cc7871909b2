// select_tokens' passes over all scores for AVX-512 (F, BW, VL, DQ).

#include "cpu/select_tokens_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

const SelectKernel kSelectAvx512 = kSelect<SimdAvx512>;

}  // namespace adaptive::cpu
