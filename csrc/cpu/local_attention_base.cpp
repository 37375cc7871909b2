// local_attention's kernel for any architecture.

#include "cpu/local_attention_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

void local_item_base(const LocalAttentionArgs& args, const LocalItem& item,
                     const LocalScratch& scratch) {
  local_item<SimdBase>(args, item, scratch);
}

}  // namespace adaptive::cpu
