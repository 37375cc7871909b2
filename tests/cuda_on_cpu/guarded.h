// Calls into CUDA sources compiled for the CPU: exceptions become what ctypes can take.

#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>

namespace {

/// Returns 0, or 1 and the message of the exception.
template <class Call>
int guarded(char* error, const Call& call, int64_t error_bytes = 1000) {
  try {
    call();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, error_bytes, "%s", e.what());
    return 1;
  }
}

/// 0 where the sizes are refused: the op then says why.
template <class Call>
int64_t bytes_or_0(const Call& call) {
  try {
    return call();
  } catch (const std::invalid_argument&) {
    return 0;
  }
}

}  // namespace
