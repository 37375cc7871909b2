// The part of the DLPack 1.x binary interface that this module reads. Layouts are fixed by the
// DLPack specification (https://dmlc.github.io/dlpack); only fields used here carry comments.

#pragma once

#include <cstdint>

namespace adaptive::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: compact, row-major
  uint64_t byte_offset;
};

/// What a tensor type publishes as `__dlpack_c_exchange_api__`, a capsule of this name.
inline constexpr const char* kExchangeApiCapsule = "dlpack_exchange_api";

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*borrow)(void* py_object, Tensor* out);  // 0, or -1 with a Python error set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace adaptive::dlpack
