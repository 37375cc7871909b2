// The kernels of decode attention and its kin for the baseline of the architecture.

#include "cpu/decode_attention_impl.h"
#include "cpu/simd_base.h"
#include "cpu/sum_tokens_impl.h"

namespace adaptive::cpu {

void decode_item_base(const DecodeAttentionArgs& args, const DecodeItem& item,
                      const DecodeScratch& scratch) {
  decode_item<SimdBase>(args, item, scratch);
}

void reduce_item_base(const ReduceItem& item) { reduce_item(item); }

void sum_item_base(const SumTokensArgs& args, const SumItem& item) {
  sum_item<SimdBase>(args, item);
}

}  // namespace adaptive::cpu
