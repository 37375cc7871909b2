// decode_attention for the 2-byte element types: one tensor-core kernel per type and head size.

#include "decode_attention_mma.cuh"

namespace adaptive::cuda {
namespace {

template <class T>
void launch(const Problem& p, dim3 grid, Stream stream) {
  const auto run = [&]<int D>() {
    simt::launch<attend_mma<T, D>>("decode_attention", grid, dim3(kThreads), p.plan.shared_bytes,
                                   stream, p);
  };
  switch (p.plan.padded_head_dim) {
    case 64: return run.template operator()<64>();
    case 128: return run.template operator()<128>();
    default: return run.template operator()<256>();
  }
}

}  // namespace

void attend_float16(const Problem& p, dim3 grid, Stream stream) {
  launch<simt::float16>(p, grid, stream);
}
void attend_bfloat16(const Problem& p, dim3 grid, Stream stream) {
  launch<simt::bfloat16>(p, grid, stream);
}

}  // namespace adaptive::cuda
