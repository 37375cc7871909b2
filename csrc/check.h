// Argument checks of the bindings. Every message reads
// `adaptive::<op>: <argument> must <condition>, got <value>`.

#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <initializer_list>
#include <string>

#include "common.h"
#include "tensor_view.h"

namespace adaptive {

/// The checks of one call of one op.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  [[noreturn]] void fail(PyObject* error, const char* argument, const std::string& condition,
                         const std::string& got) const {
    const std::string message =
        std::string("adaptive::") + op_ + ": " + argument + " must " + condition + ", got " + got;
    PyErr_SetString(error, message.c_str());
    throw pybind11::error_already_set();
  }

  /// A tensor of `rank` axes that has memory on the CPU or a CUDA device.
  void tensor(const TensorView& view, const char* argument, int rank) const {
    if (view.api == nullptr) {
      fail(PyExc_TypeError, argument, "be a strided torch.Tensor with data on cpu or cuda",
           type_name(view.object) + (view.object.is_none() ? "" : device_suffix(view)));
    }
    if (rank >= 0 && view.tensor.ndim != rank) {
      fail(PyExc_ValueError, argument, "have " + std::to_string(rank) + " dimensions", shape(view));
    }
    if (view.tensor.data == nullptr && view.numel() > 0) {
      fail(PyExc_ValueError, argument, "have data", "a tensor without memory (fake or meta)");
    }
  }

  /// `view` lies on the device of `other`.
  void same_device(const TensorView& view, const char* argument, const TensorView& other) const {
    if (view.tensor.device.type != other.tensor.device.type ||
        view.tensor.device.id != other.tensor.device.id) {
      fail(PyExc_ValueError, argument, "be on " + device(other), device(view));
    }
  }

  /// `view` lies on a device that nobody has written a kernel for, or that this build leaves out.
  [[noreturn]] void no_kernel(const TensorView& view, const char* argument) const {
#ifdef ADAPTIVE_CUDA
    const char* condition = "be on cpu or cuda, which have kernels";
#else
    const char* condition = "be on cpu, the only device that this build has kernels for";
#endif
    fail(PyExc_NotImplementedError, argument, condition, device(view));
  }

  DType dtype(const TensorView& view, const char* argument,
              std::initializer_list<DType> allowed) const {
    std::string names;
    for (const DType type : allowed) {
      if (has_dtype(view, type)) return type;
      names += (names.empty() ? "" : " or ") + std::string(dtype_name(type));
    }
    fail(PyExc_TypeError, argument, "be " + names,
         std::string(pybind11::str(view.object.attr("dtype"))));
  }

  void size(const TensorView& view, const char* argument, int axis, int64_t expected) const {
    if (view.size(axis) != expected) {
      fail(PyExc_ValueError, argument,
           "have size " + std::to_string(expected) + " in dimension " + std::to_string(axis),
           shape(view));
    }
  }

  void last_contiguous(const TensorView& view, const char* argument) const {
    const int last = view.tensor.ndim - 1;
    if (view.size(last) > 1 && view.stride(last) != 1) {
      fail(PyExc_ValueError, argument, "be contiguous in its last dimension",
           "stride " + std::to_string(view.stride(last)));
    }
  }

  void contiguous(const TensorView& view, const char* argument) const {
    int64_t expected = 1;
    for (int axis = view.tensor.ndim - 1; axis >= 0 && view.numel() > 0; --axis) {
      if (view.size(axis) > 1 && view.stride(axis) != expected) {
        fail(PyExc_ValueError, argument, "be contiguous",
             "stride " + std::to_string(view.stride(axis)) + " in dimension " +
                 std::to_string(axis));
      }
      expected *= view.size(axis);
    }
  }

  /// Strides of `view` as seen from the shape `full`: axes are aligned to the right, and one that
  /// is missing or of size 1 has stride 0.
  template <int kRank>
  void broadcast(const TensorView& view, const char* argument, const int64_t (&full)[kRank],
                 int64_t (&strides)[kRank]) const {
    const int missing = kRank - view.tensor.ndim;
    std::string wanted;
    bool fits = missing >= 0;
    for (int axis = 0; axis < kRank; ++axis) {
      wanted += (axis ? ", " : "") + std::to_string(full[axis]);
      const int own = axis - missing;
      const int64_t size = fits && own >= 0 ? view.size(own) : 1;
      fits = fits && (size == full[axis] || size == 1);
      strides[axis] = fits && size == full[axis] && own >= 0 ? view.stride(own) : 0;
    }
    if (!fits) fail(PyExc_ValueError, argument, "broadcast to [" + wanted + "]", shape(view));
  }

  /// A number as the float that the kernel computes with: finite after rounding, too.
  float number(pybind11::handle object, const char* argument) const {
    const double value = PyFloat_AsDouble(object.ptr());
    if (value == -1 && PyErr_Occurred()) {
      const bool huge = PyErr_ExceptionMatches(PyExc_OverflowError);
      PyErr_Clear();
      if (huge) fail(PyExc_ValueError, argument, "be finite in float32", type_name(object));
      fail(PyExc_TypeError, argument, "be a number", type_name(object));
    }
    const auto narrow = static_cast<float>(value);
    if (!std::isfinite(narrow)) {
      fail(PyExc_ValueError, argument, "be finite in float32", text(object));
    }
    return narrow;
  }

  /// A whole number.
  int64_t integer(pybind11::handle object, const char* argument) const {
    pybind11::object whole = pybind11::reinterpret_steal<pybind11::object>(
        PyBool_Check(object.ptr()) ? nullptr : PyNumber_Index(object.ptr()));
    if (!whole) {
      PyErr_Clear();
      fail(PyExc_TypeError, argument, "be a whole number", type_name(object));
    }
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(whole.ptr(), &overflow);
    if (overflow != 0) fail(PyExc_ValueError, argument, "fit 64 bits", text(object));
    return value;
  }

  /// A truth value. None and text are none: `causal=None` is a mistake, not a choice.
  bool flag(pybind11::handle object, const char* argument) const {
    const PyNumberMethods* methods = Py_TYPE(object.ptr())->tp_as_number;
    const bool can = !object.is_none() && methods != nullptr && methods->nb_bool != nullptr;
    const int truth = can ? PyObject_IsTrue(object.ptr()) : -1;
    if (truth < 0) {
      PyErr_Clear();
      fail(PyExc_TypeError, argument, "be True or False", type_name(object));
    }
    return truth == 1;
  }

  static std::string text(pybind11::handle object) { return pybind11::str(pybind11::repr(object)); }

  static std::string shape(const TensorView& view) {
    std::string text = "shape [";
    for (int axis = 0; axis < view.tensor.ndim; ++axis) {
      text += (axis ? ", " : "") + std::to_string(view.size(axis));
    }
    return text + "]";
  }

 private:
  static std::string type_name(pybind11::handle object) {
    return pybind11::str(pybind11::type::of(object).attr("__name__"));
  }

  static std::string device(const TensorView& view) {
    return std::string(pybind11::str(view.object.attr("device")));
  }

  static std::string device_suffix(const TensorView& view) {
    return pybind11::hasattr(view.object, "device") ? " on " + device(view) : "";
  }

  const char* op_;
};

}  // namespace adaptive
