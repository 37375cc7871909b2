// The kernels of decode attention and its kin for AVX-512 (F, BW, VL, DQ).

#include "cpu/decode_attention_impl.h"
#include "cpu/simd_avx512.h"
#include "cpu/sum_tokens_impl.h"

namespace adaptive::cpu {

void decode_item_avx512(const DecodeAttentionArgs& args, const DecodeItem& item,
                        const DecodeScratch& scratch) {
  decode_item<SimdAvx512>(args, item, scratch);
}

void reduce_item_avx512(const ReduceItem& item) { reduce_item(item); }

void sum_item_avx512(const SumTokensArgs& args, const SumItem& item) {
  sum_item<SimdAvx512>(args, item);
}

}  // namespace adaptive::cpu
