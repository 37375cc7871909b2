// router_scores' kernel for AVX-512.

#include "cpu/router_scores_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

RouterKernel router_kernel_avx512() {
  return {&prepare_router<SimdAvx512>, &sum_router<SimdAvx512>};
}

}  // namespace adaptive::cpu
