// What simulated threads do to memory that other blocks share, and arithmetic that CUDA names.

#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

inline double __dmul_rn(double a, double b) {
  const volatile double product = a * b;  // never contracted with what follows
  return product;
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicMax(T* to, std::type_identity_t<T> value) {
  T old = __atomic_load_n(to, __ATOMIC_SEQ_CST);
  while (old < value &&
         !__atomic_compare_exchange_n(to, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
template <class T>
T atomicMin(T* to, std::type_identity_t<T> value) {
  T old = __atomic_load_n(to, __ATOMIC_SEQ_CST);
  while (value < old &&
         !__atomic_compare_exchange_n(to, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
