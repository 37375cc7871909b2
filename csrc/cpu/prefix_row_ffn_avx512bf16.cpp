// prefix_row_ffn's kernel for AVX-512 with BF16.

#include "cpu/prefix_row_ffn_impl.h"
#include "cpu/simd_avx512bf16.h"

namespace adaptive::cpu {

const PrefixKernel kPrefixAvx512Bf16 = kPrefix<SimdAvx512Bf16>;

}  // namespace adaptive::cpu
