// router_scores' kernel for AVX2, FMA and F16C.

#include "cpu/router_scores_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

RouterKernel router_kernel_avx2() { return {&prepare_router<SimdAvx2>, &sum_router<SimdAvx2>}; }

}  // namespace adaptive::cpu
