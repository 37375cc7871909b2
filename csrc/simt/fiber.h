// Fibers for simt_host.h: one small stack per simulated CUDA thread, switched without a system
// call.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "simt_switch saves the callee-saved registers of x86-64; add those of this processor"
#endif

// Saves the callee-saved registers and the stack pointer to *save, then continues at `to`.
asm(R"(
.pushsection .text
.weak simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch, .-simt_switch
.popsection
)");
extern "C" void simt_switch(void** save, void* to);

namespace simt::host {

/// A function that can pause in the middle. `resume` is called by the scheduler, `pause` from
/// inside. A finished or abandoned fiber may be started again: the stack is reused.
class Fiber {
 public:
  Fiber()
      : mapping_(static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping_, kGuardBytes, PROT_NONE);  // an overflow faults instead of corrupting
  }
  ~Fiber() { munmap(mapping_, kGuardBytes + kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// The next `resume` calls body(argument) on an empty stack.
  void start(void (*body)(void*), void* argument) {
    body_ = body;
    argument_ = argument;
#if defined(__SANITIZE_ADDRESS__)
    // The frames of the previous run never returned and left their red zones behind.
    __asan_unpoison_memory_region(stack(), kStackBytes);
#endif
    // As simt_switch leaves a stack: six registers, the return address, and alignment for a call.
    void** top = reinterpret_cast<void**>(stack() + kStackBytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&Fiber::enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    pointer_ = top;
  }

  void resume() {
    starting() = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack(), kStackBytes);
#endif
    simt_switch(&scheduler_, pointer_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void pause() { leave(false); }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr std::size_t kStackBytes = 256 << 10;
#else
  static constexpr std::size_t kStackBytes = 64 << 10;
#endif
  static constexpr std::size_t kGuardBytes = 4096;

  static Fiber*& starting() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  static void enter() {
    Fiber* self = starting();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &self->scheduler_stack_, &self->scheduler_bytes_);
#endif
    self->body_(self->argument_);
    self->leave(true);
    std::abort();  // a finished fiber is never resumed
  }

  void leave([[maybe_unused]] bool finished) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(finished ? nullptr : &fake_, scheduler_stack_, scheduler_bytes_);
#endif
    simt_switch(&pointer_, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

  char* stack() const { return mapping_ + kGuardBytes; }

  char* mapping_;
  void* pointer_ = nullptr;
  void* scheduler_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_bytes_ = 0;
#endif
};

}  // namespace simt::host
