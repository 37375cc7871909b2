// select_tokens' passes over all scores for AVX2.

#include "cpu/select_tokens_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

const SelectKernel kSelectAvx2 = kSelect<SimdAvx2>;

}  // namespace adaptive::cpu
