// One simulated thread block: its coordinates, its shared memory, and the kernel in its threads.

#pragma once

#include <exception>
#include <string>

#include "memory.h"
#include "scheduler.h"

namespace simt::host {

/// All of a block runs on one operating-system thread, where it is `current_block`.
class Block : public Scheduler {
 public:
  Block(dim3 grid, dim3 size, std::size_t shared_bytes)
      : Scheduler(size.x * size.y * size.z), grid(grid), size(size), shared(shared_bytes) {
    for (Thread& t : threads()) {
      const unsigned i = t.number;
      t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    }
  }

  const dim3 grid, size;
  uint3 index{};
  SharedMemory shared;

  /// Runs kernel(argument) in every thread. Returns what went wrong, or an empty string.
  std::string run(uint3 block, void (*kernel)(void*), void* argument, unsigned seed);

 private:
  static void body(void* self) {
    auto& block = *static_cast<Block*>(self);
    Thread& t = block.thread();
    try {
      block.kernel_(block.argument_);
      if (!t.copies.empty()) {
        block.fail("a thread returned with a copy in flight: " +
                   place("cp_async16", t.copies[0].at, t.number));
      }
    } catch (const Abandon&) {
    } catch (const std::exception& error) {
      block.fail(error.what());
    }
    t.state = State::kDone;
  }

  void (*kernel_)(void*) = nullptr;
  void* argument_ = nullptr;
};

inline thread_local Block* current_block = nullptr;

inline std::string Block::run(uint3 block, void (*kernel)(void*), void* argument, unsigned seed) {
  current_block = this;
  index = block;
  kernel_ = kernel;
  argument_ = argument;
  shared.renew();
  std::string error =
      Scheduler::run(&Block::body, this, seed, 7919u * block.x + 104729u * block.y + block.z);
  current_block = nullptr;
  return error;
}

}  // namespace simt::host
