// The checks of lists of chosen keys, pages or blocks.

#include "bind_attention.h"

namespace adaptive {

void check_list(const Check& check, const Choice& choice, int64_t row, int64_t head,
                int64_t entries, const std::string& place) {
  const std::string at = "[" + place + ", " + std::to_string(head);
  const int32_t count =
      choice.counts[row * choice.counts_stride[0] + head * choice.counts_stride[1]];
  if (count < 0 || count > choice.chosen) {
    check.fail(PyExc_IndexError, ("counts" + at + "]").c_str(),
               "be in 0.." + std::to_string(choice.chosen), std::to_string(count));
  }
  const int32_t* list =
      choice.indices + row * choice.indices_stride[0] + head * choice.indices_stride[1];
  if (count == 0) return;
  bool ascends = list[0] >= 0 && list[count - 1] < entries;
  for (int32_t i = 1; i < count; ++i) ascends &= list[i - 1] < list[i];
  for (int32_t i = 0; !ascends && i < count; ++i) {
    const std::string name = "indices" + at + ", " + std::to_string(i) + "]";
    if (list[i] < 0 || list[i] >= entries) {
      check.fail(PyExc_IndexError, name.c_str(), "be in 0.." + std::to_string(entries - 1),
                 std::to_string(list[i]));
    }
    if (i > 0 && list[i - 1] >= list[i]) {
      check.fail(PyExc_IndexError, name.c_str(),
                 "be more than the one before, " + std::to_string(list[i - 1]),
                 std::to_string(list[i]));
    }
  }
}

Choice check_choice(const Check& check, const TensorView& indices, const TensorView& counts,
                    int64_t batch, int64_t kv_heads, int64_t entries, const TensorView& like) {
  check.tensor(indices, "indices", 3);
  check.tensor(counts, "counts", 2);
  for (const auto& [view, name] : {std::pair{&indices, "indices"}, std::pair{&counts, "counts"}}) {
    check.dtype(*view, name, {DType::kInt32});
    check.same_device(*view, name, like);
    check.size(*view, name, 0, batch);
    check.size(*view, name, 1, kv_heads);
  }
  check.last_contiguous(indices, "indices");
  const Choice choice{.indices = indices.data<int32_t>(),
                      .indices_stride = {indices.stride(0), indices.stride(1)},
                      .counts = counts.data<int32_t>(),
                      .counts_stride = {counts.stride(0), counts.stride(1)},
                      .chosen = indices.size(2)};
  if (indices.tensor.device.type != dlpack::kCpu) return choice;  // the CUDA kernel looks itself
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      check_list(check, choice, row, head, entries, std::to_string(row));
    }
  }
  return choice;
}

}  // namespace adaptive
