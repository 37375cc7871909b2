// The kernel of decode attention and its kin for AVX-512 (F, BW, VL, DQ).

#include "cpu/decode_attention_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

void decode_item_avx512(const DecodeAttentionArgs& args, const DecodeItem& item,
                        const DecodeScratch& scratch) {
  decode_item<SimdAvx512>(args, item, scratch);
}

}  // namespace adaptive::cpu
