// skinny_linear's kernel for AVX-512 (F, BW, VL, DQ).

#include "cpu/simd_avx512.h"
#include "cpu/skinny_linear_impl.h"

namespace adaptive::cpu {

const LinearKernel kLinearAvx512 = kLinear<SimdAvx512>;

}  // namespace adaptive::cpu
