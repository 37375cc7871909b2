// The kernel of decode attention and its kin for AVX2, FMA and F16C.

#include "cpu/decode_attention_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

void decode_item_avx2(const DecodeAttentionArgs& args, const DecodeItem& item,
                      const DecodeScratch& scratch) {
  decode_item<SimdAvx2>(args, item, scratch);
}

}  // namespace adaptive::cpu
