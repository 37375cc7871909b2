// The run-time choice of instruction set. Compiled for the baseline: it must run everywhere.

#include "cpu/level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace adaptive::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};  // by Level
constexpr const char* kVariable = "ADAPTIVE_CPU_LEVEL";

[[noreturn]] void refuse(const char* what, const std::string& got) {
  throw std::invalid_argument(std::string("adaptive::cpu_level: ") + what +
                              " must be baseline, avx2, avx512 or avx512_bf16 and at most " +
                              kNames[static_cast<int>(best_level())] + " on this CPU, got " + got);
}

Level initial_level() {
  const char* wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') return best_level();
  for (int i = 0; i <= static_cast<int>(best_level()); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Level>(i);
  }
  refuse(kVariable, wanted);
}

std::atomic<Level>& current() {
  static std::atomic<Level> level{initial_level()};  // an exception leaves it to the next call
  return level;
}

}  // namespace

Level best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Level::kAvx512Bf16;
  if (avx2 && avx512) return Level::kAvx512;
  if (avx2) return Level::kAvx2;
#endif
  return Level::kBaseline;
}

Level level() { return current().load(std::memory_order_relaxed); }

void set_level(Level level) {
  if (level > best_level()) refuse("level", kNames[static_cast<int>(level)]);
  current().store(level, std::memory_order_relaxed);
}

}  // namespace adaptive::cpu
