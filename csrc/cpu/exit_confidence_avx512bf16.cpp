// exit_confidence's kernel for AVX-512 with BF16.

#include "cpu/exit_confidence_impl.h"
#include "cpu/simd_avx512bf16.h"

namespace adaptive::cpu {

void summarise_slices_avx512bf16(const ExitConfidenceArgs& args, const float* input, int64_t width,
                                 int64_t begin, int64_t end, ExitSlice* to) {
  summarise_slices<SimdAvx512Bf16>(args, input, width, begin, end, to);
}

}  // namespace adaptive::cpu
