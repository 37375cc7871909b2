// combine_tokens' kernel for any processor.

#include "cpu/combine_tokens_impl.h"

namespace adaptive::cpu {

void combine_row_base(DType dtype, int64_t width, const CombineRow& row) {
  combine_row(dtype, width, row);
}

}  // namespace adaptive::cpu
