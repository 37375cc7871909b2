// Decides which of a block's simulated threads runs next, and whether those who wait may go on.
//
// A simulated thread runs until it meets others: at __syncthreads or in a warp collective. There
// the scheduler checks that those who must meet do meet, at the same source line; if they never
// can, the block fails with both places. Seed 0 runs each warp as far as it goes, in order; any
// other seed draws the order of warps and lanes, so that code which needs a barrier cannot pass by
// luck.

#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "thread.h"

namespace simt::host {

/// Thrown through a simulated thread to end it after its block has failed.
struct Abandon {};

class Scheduler {
 public:
  using State = Thread::State;

  explicit Scheduler(unsigned threads) : threads_(threads) {
    for (unsigned i = 0; i < threads; ++i) {
      threads_[i].number = int(i);
      threads_[i].lane = int(i % kWarpLanes);
      if (i % kWarpLanes == 0) warps_.emplace_back();
      warps_.back().push_back(&threads_[i]);
    }
  }

  /// The thread that runs now.
  Thread& thread() { return *running_; }
  std::deque<Thread>& threads() { return threads_; }

  /// Keeps the first failure; the block ends when its running thread next pauses.
  void fail(const std::string& message) {
    if (error_.empty()) error_ = message;
  }

  /// Pauses the calling thread until its whole block is here.
  void barrier(const char* operation, Where at) {
    pause(State::kBarrier, operation, 0, nullptr, nullptr, at);
  }

  /// Pauses the calling thread until the lanes of `mask` are here and `run` has served them all.
  void meet(unsigned mask, void* brought, Collective run, const char* operation, Where at) {
    if (!(mask >> running_->lane & 1)) {
      fail(place(operation, at, running_->number) + " is not in its own mask");
    }
    pause(State::kCollective, operation, mask, brought, run, at);
  }

  /// Runs body(argument) in every thread. Returns what went wrong, or an empty string.
  std::string run(void (*body)(void*), void* argument, unsigned seed, uint64_t variant) {
    error_.clear();
    seed_ = seed;
    random_ = 0x9e3779b97f4a7c15u * (seed + 1) + variant;
    for (int i = 0; i < kWarpLanes; ++i) lanes_[i] = i;
    for (int i = kWarpLanes - 1; seed && i > 0; --i) std::swap(lanes_[i], lanes_[draw() % (i + 1)]);
    for (Thread& t : threads_) {
      t.state = State::kReady;
      t.started = false;
      t.copies.clear();
      t.copy_group = 0;
      t.fiber.start(body, argument);
    }
    schedule();
    if (!error_.empty()) abandon();
    return error_;
  }

 private:
  using Warp = std::vector<Thread*>;

  void pause(State state, const char* operation, unsigned mask, void* brought, Collective run,
             Where at) {
    Thread& t = *running_;
    t.state = state;
    t.operation = operation;
    t.mask = mask;
    t.brought = brought;
    t.collective = run;
    t.at = at;
    t.fiber.pause();
    if (!error_.empty()) throw Abandon{};
  }

  void resume(Thread& t) {
    t.started = true;
    running_ = &t;
    t.fiber.resume();
  }

  void schedule() {
    std::vector<Warp*> runnable;
    for (Warp* warp = nullptr; error_.empty();) {
      bool stay = false;
      runnable.clear();
      for (Warp& w : warps_) {
        bool ready = false;
        for (const Thread* t : w) ready = ready || t->state == State::kReady;
        if (ready) runnable.push_back(&w);
        stay = stay || (ready && &w == warp);
      }
      if (runnable.empty()) {
        if (!release_barrier()) return;
        continue;
      }
      // A warp keeps running for a while, so that warps drift far apart between barriers.
      if (!stay) warp = runnable[0];
      if (seed_ && (!stay || draw() % 8 == 0)) warp = runnable[draw() % runnable.size()];
      for (int lane : lanes_) {
        if (lane >= int(warp->size())) continue;
        Thread& t = *(*warp)[lane];
        if (t.state == State::kReady) resume(t);
        if (!error_.empty()) return;
      }
      release_collectives(*warp);
    }
  }

  // Lanes that wait with the same mask must be at the same place; a complete mask is served.
  void release_collectives(const Warp& warp) {
    const unsigned exist = warp.size() == kWarpLanes ? ~0u : (1u << warp.size()) - 1;
    for (Thread* first : warp) {
      if (first->state != State::kCollective) continue;
      void* brought[kWarpLanes] = {};
      unsigned here = 0;
      for (Thread* t : warp) {
        if (t->state != State::kCollective || t->mask != first->mask) continue;
        if (!same_place(*t, *first)) return fail("warp diverged: " + waits(*first, *t));
        brought[t->lane] = t->brought;
        here |= 1u << t->lane;
      }
      if (here != (first->mask & exist)) continue;
      first->collective(brought);
      for (Thread* t : warp) {
        if (here >> t->lane & 1) t->state = State::kReady;
      }
    }
  }

  // Nobody can run. Either all have returned (false), or all are at one barrier, or it is an error.
  bool release_barrier() {
    const Thread* first = nullptr;
    for (const Thread& t : threads_) {
      if (t.state == State::kCollective) return fail("deadlock: " + waits(t, absent(t))), false;
      if (t.state == State::kBarrier && !first) first = &t;
    }
    if (!first) return false;
    for (const Thread& t : threads_) {
      if (t.state == State::kDone) return fail("deadlock: " + waits(*first, t)), false;
      if (!same_place(t, *first)) {
        return fail("threads wait at different barriers: " + waits(*first, t)), false;
      }
    }
    for (Thread& t : threads_) t.state = State::kReady;
    return true;
  }

  // A lane of the mask of `waiting` that is not there.
  const Thread& absent(const Thread& waiting) const {
    for (const Thread* t : warps_[waiting.number / kWarpLanes]) {
      const bool here = t->state == State::kCollective && t->mask == waiting.mask;
      if ((waiting.mask >> t->lane & 1) && !here) return *t;
    }
    return waiting;
  }

  // Ends every thread that has begun, so that its destructors run.
  void abandon() {
    for (Thread& t : threads_) {
      while (t.started && t.state != State::kDone) resume(t);
    }
  }

  uint64_t draw() {  // xorshift, Marsaglia 2003
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    return random_ ^= random_ << 17;
  }

  std::deque<Thread> threads_;
  std::vector<Warp> warps_;
  int lanes_[kWarpLanes];  // the order in which the lanes of a warp run
  Thread* running_ = nullptr;
  unsigned seed_ = 0;
  uint64_t random_ = 1;
  std::string error_;
};

}  // namespace simt::host
