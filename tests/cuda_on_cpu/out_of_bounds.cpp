// A kernel that reads one element too far, where its argument says. Built with the sanitizer.

#include <cstdio>
#include <cstring>
#include <vector>

#include "simt/simt.h"

namespace {

__global__ void sum(const float* in, float* out, int static_end, int dynamic_end, int global_end) {
  SHARED(float[64], fixed);
  DYN_SHARED(float, dynamic);
  fixed[threadIdx.x] = dynamic[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < static_end; ++i) total += fixed[i];
  for (int i = 0; i < dynamic_end; ++i) total += dynamic[i];
  for (int i = 0; i < global_end; ++i) total += in[i];
  total += __shfl_xor_sync(~0u, total, 1);
  out[threadIdx.x] = total;
}

}  // namespace

int main(int, char** argv) {
  const auto end = [&](const char* where) { return 64 + !std::strcmp(argv[1], where); };
  const std::vector<float> in(64, 1.0f);
  std::vector<float> out(64);
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second time on used stacks
    simt::launch<sum>("test", 3, 64, 64 * sizeof(float), nullptr, in.data(), out.data(),
                      end("shared"), end("dynamic"), end("global"));
  }
  std::printf("%g\n", out[0]);
  return out[0] == 384.0f ? 0 : 1;
}
