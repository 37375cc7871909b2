// Random numbers, and tensors whose memory ends exactly where their elements do.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "common.h"

namespace {

using adaptive::DType;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % (high - low + 1));
  }
  float number() { return static_cast<float>(unit() * 4 - 2); }
  bool chance(double p) { return unit() < p; }

 private:
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

  std::mt19937_64 engine_;
};

// An array of elements of one dtype, exactly as long as asked.
class Elements {
 public:
  Elements(DType dtype, int64_t count)
      : dtype_(dtype), bytes_(count * (dtype == DType::kFloat32 ? 4 : 2)), exact_(count) {}

  const void* data() const { return bytes_.data(); }
  /// Element i as the dtype holds it.
  const double& operator[](int64_t i) const { return exact_[i]; }
  void set(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype_ == DType::kFloat32) {
      std::memcpy(&bytes_[i * 4], &x, 4);
      exact_[i] = x;
      return;
    }
    const auto half = static_cast<uint16_t>(dtype_ == DType::kBfloat16 ? bits >> 16 : half_of(x));
    std::memcpy(&bytes_[i * 2], &half, 2);
    exact_[i] = dtype_ == DType::kBfloat16 ? from_bfloat16(half) : from_half(half);
  }

  static double from_bfloat16(uint16_t half) {
    const uint32_t bits = uint32_t{half} << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  static double from_half(uint16_t half) {
    const int exponent = half >> 10 & 31;
    const int mantissa = half & 1023;
    const double magnitude = exponent == 31  ? kNan
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
  }

 private:
  // Truncates; numbers of this driver are small. NaN stays NaN.
  static uint32_t half_of(float x) {
    if (std::isnan(x)) return 0x7e00;
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    int exponent;
    const double fraction = std::frexp(std::fabs(x), &exponent);
    if (exponent < -13) return sign | static_cast<uint32_t>(std::ldexp(std::fabs(x), 24));
    return sign | ((exponent + 14) << 10) |
           (static_cast<uint32_t>(std::ldexp(fraction, 11)) & 1023);
  }

  DType dtype_;
  std::vector<char> bytes_;
  std::vector<double> exact_;
};

struct Tensor {
  std::unique_ptr<Elements> elements;
  int64_t stride[3];
};

// [a, b, c, width] with random gaps between rows, filled with numbers; gaps are NaN.
Tensor tensor(Random& random, DType dtype, int64_t a, int64_t b, int64_t c, int64_t width) {
  Tensor made;
  const int64_t pitch = width + random.between(0, 3) * random.between(0, 5);
  const bool tokens_first = random.chance(0.5);
  made.stride[0] = b * c * pitch;
  made.stride[1] = tokens_first ? pitch : c * pitch;
  made.stride[2] = tokens_first ? b * pitch : pitch;
  const int64_t count = a * b * c == 0 ? 0 : (a * b * c - 1) * pitch + width;
  made.elements = std::make_unique<Elements>(dtype, count);
  for (int64_t i = 0; i < count; ++i) {
    made.elements->set(i, i % pitch < width ? random.number() : kNan);
  }
  return made;
}

}  // namespace
