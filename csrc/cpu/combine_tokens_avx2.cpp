// combine_tokens' kernel for AVX2, FMA and F16C.

#include "cpu/combine_tokens_impl.h"

namespace adaptive::cpu {

void combine_row_avx2(DType dtype, int64_t width, const CombineRow& row) {
  combine_row(dtype, width, row);
}

}  // namespace adaptive::cpu
