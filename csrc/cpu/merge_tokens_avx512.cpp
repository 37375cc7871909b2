// merge_tokens' kernels for AVX-512 (F, BW, VL, DQ).

#include "cpu/merge_tokens_impl.h"
#include "cpu/simd_avx512.h"

namespace adaptive::cpu {

void match_sources_avx512(const MergeTokensArgs& args, const MergeMatch& match) {
  match_sources<SimdAvx512>(args, match);
}

void average_group_avx512(const MergeTokensArgs& args, const MergeGroup& group) {
  average_group<SimdAvx512>(args, group);
}

}  // namespace adaptive::cpu
