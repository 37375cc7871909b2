// The checks that the bindings of ops on rows of hidden states share.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bind_verify.h"
#include "check.h"
#include "tensor_view.h"

namespace adaptive {

/// Checks hidden states, [batch, tokens, width], of any stride but the last.
inline DType check_hidden(const Check& check, const TensorView& hidden) {
  check.tensor(hidden, "hidden", 3);
  const DType dtype =
      check.dtype(hidden, "hidden", {DType::kFloat32, DType::kFloat16, DType::kBfloat16});
  check.last_contiguous(hidden, "hidden");
  if (hidden.size(1) > int64_t{1} << 30) {
    check.fail(PyExc_ValueError, "hidden", "have at most 1073741824 tokens", check.shape(hidden));
  }
  return dtype;
}

/// Checks positions of tokens, [batch, chosen] with -1 for none. On the CPU each must exist and be
/// listed once; a CUDA kernel looks for itself.
inline const int32_t* check_positions(const Check& check, const TensorView& tokens,
                                      const TensorView& hidden) {
  check.tensor(tokens, "tokens", 2);
  const int64_t batch = hidden.size(0), length = hidden.size(1), chosen = tokens.size(1);
  check_rows(check, tokens, "tokens", DType::kInt32, {batch, chosen}, hidden);
  const auto* list = tokens.data<const int32_t>();
  if (tokens.tensor.device.type != dlpack::kCpu) return list;
  std::vector<bool> listed;
  for (int64_t row = 0; row < batch; ++row) {
    listed.assign(length, false);
    for (int64_t entry = 0; entry < chosen; ++entry) {
      const int32_t token = list[row * tokens.stride(0) + entry];
      if (token == -1) continue;
      const bool exists = token >= 0 && token < length;
      if (!exists || listed[token]) {
        const std::string at = std::to_string(row) + ", " + std::to_string(entry);
        check.fail(
            PyExc_IndexError, ("tokens[" + at + "]").c_str(),
            exists ? "be listed once in its row" : "be -1 or in 0.." + std::to_string(length - 1),
            std::to_string(token));
      }
      listed[token] = true;
    }
  }
  return list;
}

/// Checks hidden states and the list of some of their tokens, and puts both into the op's Args.
template <class Args>
void set_listed(const Check& check, Args& args, const TensorView& hidden,
                const TensorView& tokens) {
  args.dtype = check_hidden(check, hidden);
  args.list = check_positions(check, tokens, hidden);
  args.list_stride = tokens.stride(0);
  args.batch = hidden.size(0);
  args.tokens = hidden.size(1);
  args.width = hidden.size(2);
  args.chosen = tokens.size(1);
  args.hidden = hidden.data<void>();
  for (int axis = 0; axis < 2; ++axis) args.hidden_stride[axis] = hidden.stride(axis);
}

}  // namespace adaptive
