// skinny_linear's kernel for AVX-512 with BF16.

#include "cpu/simd_avx512bf16.h"
#include "cpu/skinny_linear_impl.h"

namespace adaptive::cpu {

const LinearKernel kLinearAvx512Bf16 = kLinear<SimdAvx512Bf16>;

}  // namespace adaptive::cpu
