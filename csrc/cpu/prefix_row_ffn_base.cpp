// prefix_row_ffn's kernel for the baseline of the architecture.

#include "cpu/prefix_row_ffn_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

const PrefixKernel kPrefixBase = kPrefix<SimdBase>;

}  // namespace adaptive::cpu
