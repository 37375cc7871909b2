// The kernel of decode attention and its kin for AVX-512 with BF16.

#include "cpu/decode_attention_impl.h"
#include "cpu/simd_avx512bf16.h"

namespace adaptive::cpu {

void decode_item_avx512bf16(const DecodeAttentionArgs& args, const DecodeItem& item,
                            const DecodeScratch& scratch) {
  decode_item<SimdAvx512Bf16>(args, item, scratch);
}

}  // namespace adaptive::cpu
