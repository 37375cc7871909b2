// Memory advice for large, long-lived buffers such as a KV cache.

#pragma once

#include <cstdint>

namespace adaptive::cpu {

/// Asks for huge pages behind the whole pages inside [data, data + bytes). A hint: nothing happens
/// where the system has none, and a kernel that declines is no error.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace adaptive::cpu
