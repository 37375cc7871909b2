// merge_tokens' kernels for the baseline of the architecture.

#include "cpu/merge_tokens_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

void match_sources_base(const MergeTokensArgs& args, const MergeMatch& match) {
  match_sources<SimdBase>(args, match);
}

void average_group_base(const MergeTokensArgs& args, const MergeGroup& group) {
  average_group<SimdBase>(args, group);
}

}  // namespace adaptive::cpu
