// DeviceGuard: see device.h.

#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace adaptive::cuda {

DeviceGuard::DeviceGuard(int device) {
  cudaError_t error = cudaGetDevice(&previous_);
  if (error == cudaSuccess && previous_ != device) error = cudaSetDevice(device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("adaptive: cannot use CUDA device ") +
                             std::to_string(device) + ": " + cudaGetErrorString(error));
  }
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

}  // namespace adaptive::cuda
