// router_scores' kernel for any processor.

#include "cpu/router_scores_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

RouterKernel router_kernel_base() { return {&prepare_router<SimdBase>, &sum_router<SimdBase>}; }

}  // namespace adaptive::cpu
