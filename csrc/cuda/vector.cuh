// 16 bytes of elements, loaded at once where they are aligned.

#pragma once

#include "../simt/simt.h"

namespace adaptive::cuda {

constexpr int kVectorBytes = 16;

template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kElements = kVectorBytes / sizeof(T);
  T x[kElements];
};

/// `wide`: `from` is on a 16-byte boundary.
template <class T>
__device__ __forceinline__ Vector<T> load(const T* from, bool wide) {
  if (wide) return *reinterpret_cast<const Vector<T>*>(from);
  Vector<T> made;
#pragma unroll
  for (int i = 0; i < Vector<T>::kElements; ++i) made.x[i] = from[i];
  return made;
}

}  // namespace adaptive::cuda
