// The passes of select_tokens for the baseline of the architecture.

#include "cpu/select_tokens_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

SelectKernels select_kernels_base() { return select_kernels<SimdBase>(); }

}  // namespace adaptive::cpu
