// The reduction of score_tokens for the baseline of the architecture.

#include "cpu/score_tokens_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

void reduce_item_base(const ReduceItem& item) { reduce_item<SimdBase>(item); }

}  // namespace adaptive::cpu
