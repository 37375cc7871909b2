// sparse_row_ffn's kernel for the baseline of the architecture.

#include "cpu/simd_base.h"
#include "cpu/sparse_row_ffn_impl.h"

namespace adaptive::cpu {

const SparseKernel kSparseBase = kSparse<SimdBase>;

}  // namespace adaptive::cpu
