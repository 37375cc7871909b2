// Puts the CUDA decode_attention, on the simulator, where tests/native/driver.cpp calls the CPU.

#include <cstdlib>
#include <memory>

#include "cpu/level.h"
#include "decode_attention.h"

namespace adaptive::cpu {

Level best_level() { return Level::kBaseline; }

void set_level(Level) {}

void decode_attention(const DecodeAttentionArgs& args) {
  DecodeAttentionArgs with_workspace = args;
  with_workspace.workspace_bytes = cuda::decode_attention_workspace_bytes(args);
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::malloc(with_workspace.workspace_bytes), &std::free);
  with_workspace.workspace = workspace.get();
  cuda::decode_attention(with_workspace, nullptr);
}

}  // namespace adaptive::cpu
