// merge_tokens' kernels for AVX2, FMA and F16C.

#include "cpu/merge_tokens_impl.h"
#include "cpu/simd_avx2.h"

namespace adaptive::cpu {

void match_sources_avx2(const MergeTokensArgs& args, const MergeMatch& match) {
  match_sources<SimdAvx2>(args, match);
}

void average_group_avx2(const MergeTokensArgs& args, const MergeGroup& group) {
  average_group<SimdAvx2>(args, group);
}

}  // namespace adaptive::cpu
