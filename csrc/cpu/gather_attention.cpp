// gather_attention on the CPU.

#include "gather_attention.h"

#include "cpu/decode_schedule.h"

namespace adaptive::cpu {

void gather_attention(const GatherAttentionArgs& args) {
  const DecodeAttentionArgs& sizes = args.attention;
  if (sizes.batch == 0 || sizes.heads == 0 || sizes.query_tokens == 0) return;
  DecodeSchedule(args.attention, &args).run();
}

}  // namespace adaptive::cpu
