// The kernel of decode attention and its kin for the baseline of the architecture.

#include "cpu/decode_attention_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

void decode_item_base(const DecodeAttentionArgs& args, const DecodeItem& item,
                      const DecodeScratch& scratch) {
  decode_item<SimdBase>(args, item, scratch);
}

}  // namespace adaptive::cpu
