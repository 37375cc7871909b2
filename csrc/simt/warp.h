// What the lanes of a simulated warp do together, and the 2-byte element types.

#pragma once

#include <bit>
#include <cstdint>

#include "block.h"

namespace simt {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(float16 x) { return float(std::bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  return {std::bit_cast<uint16_t>(_Float16(x))};
}

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

namespace host {

template <class T>
struct Exchange {
  T value;
  T result;
  int source;
};

template <class T>
T exchange(unsigned mask, T value, int source, const char* name, Where at) {
  Exchange<T> mine{value, value, source};
  const auto run = [](void* const(&lanes)[kWarpLanes]) {
    for (void* lane : lanes) {
      if (!lane) continue;
      auto* to = static_cast<Exchange<T>*>(lane);
      const auto* from = static_cast<const Exchange<T>*>(lanes[to->source]);
      if (!from) return current_block->fail("a shuffle reads a lane that is not in its mask");
      to->result = from->value;
    }
  };
  current_block->meet(mask, &mine, run, name, at);
  return mine.result;
}

/// Fails the block, and returns false, where the instruction needs all 32 lanes and some do not
/// exist.
inline bool full_warp(void* const (&lanes)[kWarpLanes]) {
  for (void* lane : lanes) {
    if (lane) continue;
    current_block->fail("a matrix instruction needs all 32 lanes of its warp");
    return false;
  }
  return true;
}

struct Vote {
  bool predicate;
  unsigned result;
};

template <class T>
struct Product {
  float (*d)[4];
  uint32_t a[4], b[2];

  static void run(void* const (&lanes)[kWarpLanes]) {
    if (!full_warp(lanes)) return;
    // Fragments by the PTX manual, "Matrix Fragments for mma.m16n8k16": group = lane / 4 holds
    // rows group and group + 8 of A and column `group` of B, two neighbours in k to a register.
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const auto& from = *static_cast<const Product*>(lanes[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) unpack(from.a[i], &a[group + i % 2 * 8][pair + i / 2 * 8], 1);
      for (int i = 0; i < 2; ++i) unpack(from.b[i], &b[pair + i * 8][group], 8);
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      auto& d = *static_cast<const Product*>(lanes[lane])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) d[i] += a[row][k] * b[k][column];
      }
    }
  }
  static void unpack(uint32_t word, float* to, int step) {
    to[0] = to_float(T{uint16_t(word)});
    to[step] = to_float(T{uint16_t(word >> 16)});
  }
};

template <bool kTransposed>
struct Tiles {
  uint16_t row[8];
  uint32_t* result;

  // Lane i brings row i % 8 of 8 x 8 matrix i / 8; every lane receives two elements of each.
  static void run(void* const (&lanes)[kWarpLanes]) {
    if (!full_warp(lanes)) return;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int major = lane / 4, minor = lane % 4 * 2;
        uint32_t word = 0;
        for (int i = 0; i < 2; ++i) {
          const int row = kTransposed ? minor + i : major, column = kTransposed ? major : minor + i;
          word |= uint32_t(static_cast<Tiles*>(lanes[matrix * 8 + row])->row[column]) << 16 * i;
        }
        static_cast<Tiles*>(lanes[lane])->result[matrix] = word;
      }
    }
  }
};

}  // namespace host
}  // namespace simt
