// prefix_row_ffn's kernel for AVX-512.

#include "cpu/prefix_row_ffn_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

const PrefixKernel kPrefixAvx512 = kPrefix<SimdAvx512>;

}  // namespace adaptive::cpu
