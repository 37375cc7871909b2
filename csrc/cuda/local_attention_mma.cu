// local_attention and block_sparse_attention for the 2-byte element types: one tensor-core kernel
// per type and head size.

#include "local_attention_kernel.cuh"

namespace adaptive::cuda {

void attend_local_half(const LocalProblem& p, dim3 grid, int warps, Stream stream) {
  with_local_head_dim(p.args, [&]<int D>() {
    if (p.args.dtype == DType::kFloat16)
      return launch_local<simt::float16, D>(p, grid, warps, stream);
    return launch_local<simt::bfloat16, D>(p, grid, warps, stream);
  });
}

}  // namespace adaptive::cuda
