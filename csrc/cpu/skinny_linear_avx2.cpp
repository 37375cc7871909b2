// skinny_linear's kernel for AVX2.

#include "cpu/simd_avx2.h"
#include "cpu/skinny_linear_impl.h"

namespace adaptive::cpu {

const LinearKernel kLinearAvx2 = kLinear<SimdAvx2>;

}  // namespace adaptive::cpu
