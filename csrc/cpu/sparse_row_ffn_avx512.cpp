// sparse_row_ffn's kernel for AVX-512.

#include "cpu/simd_avx512.h"
#include "cpu/sparse_row_ffn_impl.h"

namespace adaptive::cpu {

const SparseKernel kSparseAvx512 = kSparse<SimdAvx512>;

}  // namespace adaptive::cpu
