// sparse_row_ffn's kernel for AVX2.

#include "cpu/simd_avx2.h"
#include "cpu/sparse_row_ffn_impl.h"

namespace adaptive::cpu {

const SparseKernel kSparseAvx2 = kSparse<SimdAvx2>;

}  // namespace adaptive::cpu
