// The passes of select_tokens for AVX2, FMA and F16C.

#include "cpu/select_tokens_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

SelectKernels select_kernels_avx2() { return select_kernels<SimdAvx2>(); }

}  // namespace adaptive::cpu
