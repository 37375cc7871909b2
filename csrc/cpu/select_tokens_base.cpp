// select_tokens' passes over all scores for the baseline of the architecture.

#include "cpu/select_tokens_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

const SelectKernel kSelectBase = kSelect<SimdBase>;

}  // namespace adaptive::cpu
