// Which instruction set the CPU kernels use: the best of this machine, or a lower one for tests.

#pragma once

namespace adaptive::cpu {

enum class Level : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

/// The highest level that this CPU and its operating system run.
Level best_level();

/// The level in force: best_level(), unless set_level or, in the environment at first use,
/// ADAPTIVE_CPU_LEVEL=baseline|avx2|avx512|avx512_bf16 lowered it. Throws std::invalid_argument if
/// that variable names no level of this CPU.
Level level();

/// Applies to calls that start afterwards, on every thread. Throws std::invalid_argument if `level`
/// is above best_level().
void set_level(Level level);

template <class Kernel>
Kernel at_level(Kernel base, Kernel avx2, Kernel avx512) {
  return level() >= Level::kAvx512 ? avx512 : level() == Level::kAvx2 ? avx2 : base;
}

}  // namespace adaptive::cpu

/// Of the functions kernel_base, kernel_avx2 and kernel_avx512, that of the level in force; the
/// last also serves kAvx512Bf16.
#if defined(__x86_64__)
#define ADAPTIVE_AT_LEVEL(kernel) \
  ::adaptive::cpu::at_level(&kernel##_base, &kernel##_avx2, &kernel##_avx512)
#else
#define ADAPTIVE_AT_LEVEL(kernel) (&kernel##_base)
#endif
