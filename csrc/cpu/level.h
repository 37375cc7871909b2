// Which instruction set the CPU kernels use: the best of this machine, or a lower one for tests.

#pragma once

namespace adaptive::cpu {

enum class Level : int { kBaseline, kAvx2, kAvx512 };

/// The highest level that this CPU and its operating system run.
Level best_level();

/// The level in force: best_level(), unless set_level or, in the environment at first use,
/// ADAPTIVE_CPU_LEVEL=baseline|avx2|avx512 lowered it. Throws std::invalid_argument if that
/// variable names no level of this CPU.
Level level();

/// Applies to calls that start afterwards, on every thread. Throws std::invalid_argument if `level`
/// is above best_level().
void set_level(Level level);

}  // namespace adaptive::cpu
