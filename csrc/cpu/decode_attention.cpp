// decode_attention on the CPU.

#include "decode_attention.h"

#include "cpu/decode_schedule.h"

namespace adaptive::cpu {

void decode_attention(const DecodeAttentionArgs& args) {
  if (args.batch == 0 || args.heads == 0 || args.query_tokens == 0) return;
  DecodeSchedule(args, nullptr).run();
}

}  // namespace adaptive::cpu
