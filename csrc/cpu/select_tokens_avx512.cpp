// The passes of select_tokens for AVX-512 (F, BW, VL, DQ).

#include "cpu/select_tokens_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

SelectKernels select_kernels_avx512() { return select_kernels<SimdAvx512>(); }

}  // namespace adaptive::cpu
