// TensorView: a non-owning look at a Python tensor through DLPack's C exchange API, and the
// pybind11 caster that makes one from an argument. No torch header, no capsule, no copy.

#pragma once

#include <pybind11/pybind11.h>

#include "common.h"
#include "dlpack_abi.h"

namespace adaptive {

/// An argument as it came. `object` is borrowed and lives as long as the call. Whether it is a
/// tensor at all is judged by the check that knows the argument's name (check.h).
struct TensorView {
  pybind11::handle object;
  dlpack::Tensor tensor{};
  const dlpack::ExchangeApi* api = nullptr;  // null: not a tensor, or one without data

  bool given() const { return object && !object.is_none(); }
  int64_t size(int axis) const { return tensor.shape[axis]; }
  int64_t stride(int axis) const {
    if (tensor.strides != nullptr) return tensor.strides[axis];
    int64_t product = 1;  // DLPack lets a compact row-major tensor leave its strides out
    for (int inner = axis + 1; inner < tensor.ndim; ++inner) product *= tensor.shape[inner];
    return product;
  }
  int64_t numel() const {
    int64_t count = 1;
    for (int axis = 0; axis < tensor.ndim; ++axis) count *= tensor.shape[axis];
    return count;
  }
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(tensor.data) + tensor.byte_offset);
  }
};

/// The exchange API of a tensor type, or null. The last type asked for is remembered; the GIL is
/// held here.
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known_type = nullptr;
  static const dlpack::ExchangeApi* known_api = nullptr;
  if (type == known_type) return known_api;

  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule, dlpack::kExchangeApiCapsule));
  Py_DECREF(capsule);
  if (api == nullptr) PyErr_Clear();
  if (api == nullptr || api->major != 1) return nullptr;
  Py_INCREF(type);  // so that the address of a remembered type is never reused by another
  Py_XDECREF(known_type);
  known_type = type;
  known_api = api;
  return api;
}

inline const char* dtype_name(DType type) {
  switch (type) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBfloat16: return "bfloat16";
    case DType::kBool: return "bool";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kInt8: return "int8";
  }
  return "?";
}

inline bool has_dtype(const TensorView& view, DType type) {
  const auto [code, bits, lanes] = view.tensor.dtype;
  switch (type) {
    case DType::kFloat32: return code == dlpack::kFloat && bits == 32;
    case DType::kFloat16: return code == dlpack::kFloat && bits == 16;
    case DType::kBfloat16: return code == dlpack::kBfloat && bits == 16;
    case DType::kBool: return code == dlpack::kBool && bits == 8;
    case DType::kInt32: return code == dlpack::kInt && bits == 32;
    case DType::kInt64: return code == dlpack::kInt && bits == 64;
    case DType::kInt8: return code == dlpack::kInt && bits == 8;
  }
  return false;
}

}  // namespace adaptive

namespace pybind11::detail {

template <>
struct type_caster<adaptive::TensorView> {
  PYBIND11_TYPE_CASTER(adaptive::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value.object = source;
    if (source.is_none()) return true;
    value.api = adaptive::exchange_api(Py_TYPE(source.ptr()));
    if (value.api != nullptr && value.api->borrow(source.ptr(), &value.tensor) != 0) {
      PyErr_Clear();  // a tensor without data (meta, sparse): the check names the argument
      value.api = nullptr;
    }
    return true;
  }

  static handle cast(const adaptive::TensorView& view, return_value_policy, handle) {
    return view.object.inc_ref();
  }
};

}  // namespace pybind11::detail
