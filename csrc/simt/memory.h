// The shared memory of a simulated block: NaN until written, and known to its last byte.

#pragma once

#include <cstdlib>
#include <cstring>
#include <deque>
#include <new>

namespace simt::host {

inline constexpr int kPoison = 0xff;  // as the bytes of any floating-point type: NaN

/// Poisoned memory of its own allocation, so that the address sanitizer sees both its ends.
class Storage {
 public:
  explicit Storage(std::size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&data_, 128, bytes + !bytes)) throw std::bad_alloc();
    poison();
  }
  ~Storage() { std::free(data_); }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  void* data() const { return data_; }
  void poison() { std::memset(data_, kPoison, bytes_); }
  bool contains(const void* p, std::size_t bytes) const {
    const auto* begin = static_cast<const char*>(data_);
    const auto* at = static_cast<const char*>(p);
    return at >= begin && at + bytes <= begin + bytes_;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

/// What DYN_SHARED and SHARED stand for. A block begins with `renew`.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t dynamic_bytes) : dynamic_(dynamic_bytes) {}

  void renew() {
    variables_.clear();
    dynamic_.poison();
  }
  void* dynamic() const { return dynamic_.data(); }

  /// The block's own variable behind a declaration; made by the first thread that reaches it.
  void* variable(const void* declaration, std::size_t bytes) {
    for (Variable& v : variables_) {
      if (v.declaration == declaration) return v.storage.data();
    }
    return variables_.emplace_back(declaration, bytes).storage.data();
  }

  bool contains(const void* p, std::size_t bytes) const {
    for (const Variable& v : variables_) {
      if (v.storage.contains(p, bytes)) return true;
    }
    return dynamic_.contains(p, bytes);
  }

 private:
  struct Variable {
    Variable(const void* declaration, std::size_t bytes)
        : declaration(declaration), storage(bytes) {}
    const void* declaration;
    Storage storage;
  };
  std::deque<Variable> variables_;
  Storage dynamic_;
};

}  // namespace simt::host
