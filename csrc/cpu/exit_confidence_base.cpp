// exit_confidence's kernel for the baseline of the architecture.

#include "cpu/exit_confidence_impl.h"
#include "cpu/simd_base.h"

namespace adaptive::cpu {

void summarise_slices_base(const ExitConfidenceArgs& args, const float* input, int64_t width,
                           int64_t begin, int64_t end, ExitSlice* to) {
  summarise_slices<SimdBase>(args, input, width, begin, end, to);
}

}  // namespace adaptive::cpu
