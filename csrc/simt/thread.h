// One simulated CUDA thread: its place in the block, what it waits for, its copies in flight.

#pragma once

#include <cstring>
#include <source_location>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace simt::host {

using Where = std::source_location;
inline constexpr int kWarpLanes = 32;

/// What a collective does once all its lanes have met: lanes[i] is what lane i brought, or null.
using Collective = void (*)(void* const (&lanes)[kWarpLanes]);

/// 16 bytes on their way to shared memory.
struct Copy {
  void* to;
  unsigned char bytes[16];
  int group;
  Where at;
};

struct Thread {
  enum class State { kReady, kBarrier, kCollective, kDone };
  Fiber fiber;
  uint3 index{};
  int number = 0, lane = 0;
  State state = State::kDone;
  bool started = false;

  // What it waits for, when it does.
  const char* operation = "";
  Where at{};
  unsigned mask = 0;
  void* brought = nullptr;
  Collective collective = nullptr;

  std::vector<Copy> copies;  // in flight, oldest first
  int copy_group = 0;        // the group that the next copy joins

  /// Lands all copies but those of the `pending` latest groups.
  void land_copies(int pending) {
    auto last = copies.begin();
    for (; last != copies.end() && last->group < copy_group - pending; ++last) {
      std::memcpy(last->to, last->bytes, sizeof last->bytes);
    }
    copies.erase(copies.begin(), last);
  }
};

/// For messages: "__syncthreads at kernel.cu:12 (thread 3)".
inline std::string place(const char* operation, const Where& at, int thread) {
  return std::string(operation) + " at " + at.file_name() + ":" + std::to_string(at.line()) +
         " (thread " + std::to_string(thread) + ")";
}
inline std::string place(const Thread& t) {
  if (t.state == Thread::State::kDone) {
    return "thread " + std::to_string(t.number) + ", which returned";
  }
  return place(t.operation, t.at, t.number);
}
inline std::string waits(const Thread& t, const Thread& other) {
  return place(t) + " waits for " + place(other);
}
inline bool same_place(const Thread& a, const Thread& b) {
  return a.at.line() == b.at.line() && !std::strcmp(a.at.file_name(), b.at.file_name());
}

}  // namespace simt::host
