// The shared memory of a simulated block: NaN until written, and known to its last byte.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace simt::host {

inline constexpr int kPoison = 0xff;  // as the bytes of any floating-point type: NaN

/// Poisoned memory of its own allocation, so that the address sanitizer sees both its ends.
class Storage {
 public:
  explicit Storage(std::size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&data_, 128, std::max<std::size_t>(bytes, 1))) throw std::bad_alloc();
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
    for (auto& [known, storage] : variables_) {
      if (known == declaration) return storage->data();
    }
    variables_.emplace_back(declaration, std::make_unique<Storage>(bytes));
    return variables_.back().second->data();
  }

  bool contains(const void* p, std::size_t bytes) const {
    const auto holds = [&](const auto& v) { return v.second->contains(p, bytes); };
    return dynamic_.contains(p, bytes) || std::any_of(variables_.begin(), variables_.end(), holds);
  }

 private:
  std::vector<std::pair<const void*, std::unique_ptr<Storage>>> variables_;
  Storage dynamic_;
};

}  // namespace simt::host
