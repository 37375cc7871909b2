// Which CUDA device a launch goes to. Free of CUDA headers, for the bindings.

#pragma once

namespace adaptive::cuda {

/// Makes `device` current for the life of the guard, then puts the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace adaptive::cuda
