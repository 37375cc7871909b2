// The check of where rows are cut into sequences.

#include "bind_attention.h"

namespace adaptive {

Cuts check_offsets(const Check& check, const TensorView& offsets, int64_t batch, int64_t tokens,
                   const TensorView& like) {
  if (!offsets.given()) return {};
  check.tensor(offsets, "offsets", 2);
  check.dtype(offsets, "offsets", {DType::kInt32});
  check.same_device(offsets, "offsets", like);
  check.size(offsets, "offsets", 0, batch);
  check.last_contiguous(offsets, "offsets");
  const Cuts made{offsets.data<int32_t>(), offsets.stride(0), offsets.size(1)};
  if (made.count < 2) {
    check.fail(PyExc_ValueError, "offsets", "have at least 2 entries per row",
               check.shape(offsets));
  }
  if (offsets.tensor.device.type != dlpack::kCpu) return made;  // the CUDA kernel looks itself
  for (int64_t row = 0; row < batch; ++row) {
    const int32_t* cuts = made.offsets + row * made.stride;
    for (int64_t i = 0; i < made.count; ++i) {
      const int32_t low = i == 0 ? 0 : cuts[i - 1];
      if (cuts[i] >= low && cuts[i] <= tokens) continue;
      const std::string place = std::to_string(row) + ", " + std::to_string(i);
      check.fail(PyExc_IndexError, ("offsets[" + place + "]").c_str(),
                 "be in " + std::to_string(low) + ".." + std::to_string(tokens) +
                     ", not below the one before",
                 std::to_string(cuts[i]));
    }
  }
  return made;
}

}  // namespace adaptive
