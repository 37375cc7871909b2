// prefix_row_ffn's kernel for AVX2.

#include "cpu/prefix_row_ffn_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

const PrefixKernel kPrefixAvx2 = kPrefix<SimdAvx2>;

}  // namespace adaptive::cpu
