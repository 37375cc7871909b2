// pool_blocks on the CPU: a block is one piece of work, so no result depends on another.

#include "pool_blocks.h"

#include <algorithm>

#include "cpu/decode_schedule.h"
#include "cpu/level.h"
#include "cpu/pool_blocks_kernel.h"

namespace adaptive::cpu {

void pool_blocks(const PoolBlocksArgs& args) {
  const int64_t blocks = args.blocks(), pieces = args.batch * args.heads * blocks;
  const int64_t element_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
  const int threads =
      useful_threads(pieces, args.batch * args.heads * args.tokens * args.head_dim * element_bytes);
  const PoolKernel kernel = ADAPTIVE_AT_LEVEL(pool_item);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t batch = i / blocks / args.heads;
    int64_t first = 0, last = args.tokens;
    if (args.offsets != nullptr) {
      const int32_t* cuts = args.offsets + batch * args.offsets_stride;
      first = cuts[0];
      last = cuts[args.cuts - 1];
    }
    const int64_t begin = i % blocks * args.block_size;
    const int64_t from = std::max(begin, first);
    kernel(args, {.batch = batch,
                  .head = i / blocks % args.heads,
                  .begin = from,
                  .end = std::max(from, std::min(begin + args.block_size, last)),
                  .mean = args.means + i * args.head_dim});
  }
}

}  // namespace adaptive::cpu
