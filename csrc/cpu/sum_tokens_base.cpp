// sum_tokens' kernel for the baseline of the architecture.

#include "cpu/simd_base.h"
#include "cpu/sum_tokens_impl.h"

namespace adaptive::cpu {

void sum_item_base(const SumTokensArgs& args, const SumItem& item) {
  sum_item<SimdBase>(args, item);
}

}  // namespace adaptive::cpu
