// The checks that the bindings of ops on drafted tokens share.

#pragma once

#include <string>

#include "check.h"
#include "tensor_view.h"

namespace adaptive {

/// Checks a list of rows whose sizes are known, on the device of `like`.
inline void check_rows(const Check& check, const TensorView& view, const char* name, DType dtype,
                       std::initializer_list<int64_t> sizes, const TensorView& like) {
  check.tensor(view, name, static_cast<int>(sizes.size()));
  check.dtype(view, name, {dtype});
  check.same_device(view, name, like);
  int axis = 0;
  for (const int64_t size : sizes) check.size(view, name, axis++, size);
  check.last_contiguous(view, name);
}

/// The same of one that is contiguous as a whole, as outputs are; returns its data.
template <class T>
T* contiguous_rows(const Check& check, const TensorView& view, const char* name, DType dtype,
                   std::initializer_list<int64_t> sizes, const TensorView& like) {
  check_rows(check, view, name, dtype, sizes, like);
  check.contiguous(view, name);
  return view.data<T>();
}

/// Checks how many nodes of each row are real (on CUDA the kernel looks); null if not given.
inline const int64_t* check_node_counts(const Check& check, const TensorView& lengths,
                                        int64_t batch, int64_t nodes, const TensorView& like) {
  if (!lengths.given()) return nullptr;
  const auto* values =
      contiguous_rows<const int64_t>(check, lengths, "lengths", DType::kInt64, {batch}, like);
  if (lengths.tensor.device.type != dlpack::kCpu) return values;
  for (int64_t row = 0; row < batch; ++row) {
    if (values[row] < 0 || values[row] > nodes) {
      check.fail(PyExc_IndexError, ("lengths[" + std::to_string(row) + "]").c_str(),
                 "be in 0.." + std::to_string(nodes), std::to_string(values[row]));
    }
  }
  return values;
}

/// Checks that the parent of each node is an earlier one, or -1 (on CUDA the kernel looks). Nodes
/// that are not real are not looked at.
inline const int64_t* check_parents(const Check& check, const TensorView& parents, int64_t batch,
                                    int64_t nodes, const int64_t* lengths, const TensorView& like) {
  const auto* values = contiguous_rows<const int64_t>(check, parents, "parents", DType::kInt64,
                                                      {batch, nodes}, like);
  if (parents.tensor.device.type != dlpack::kCpu) return values;
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t node = 0; node < (lengths ? lengths[row] : nodes); ++node) {
      const int64_t parent = values[row * nodes + node];
      if (parent >= -1 && parent < node) continue;
      const std::string at = std::to_string(row) + ", " + std::to_string(node);
      check.fail(PyExc_IndexError, ("parents[" + at + "]").c_str(),
                 "be in -1.." + std::to_string(node - 1), std::to_string(parent));
    }
  }
  return values;
}

}  // namespace adaptive
