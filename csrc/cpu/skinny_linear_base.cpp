// skinny_linear's kernel for the baseline of the architecture.

#include "cpu/simd_base.h"
#include "cpu/skinny_linear_impl.h"

namespace adaptive::cpu {

const LinearKernel kLinearBase = kLinear<SimdBase>;

}  // namespace adaptive::cpu
