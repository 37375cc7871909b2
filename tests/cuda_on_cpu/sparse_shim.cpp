// The CUDA entry points of the ops of sparse selection, callable through ctypes.

#include <cstdint>

#include "gather_attention.h"
#include "guarded.h"
#include "score_tokens.h"
#include "select_tokens.h"
#include "sum_tokens.h"

extern "C" {

int64_t gather_args_bytes() { return sizeof(adaptive::GatherAttentionArgs); }
int64_t score_args_bytes() { return sizeof(adaptive::ScoreTokensArgs); }
int64_t select_args_bytes() { return sizeof(adaptive::SelectTokensArgs); }
int64_t sum_args_bytes() { return sizeof(adaptive::SumTokensArgs); }

int64_t gather_workspace_bytes(const adaptive::GatherAttentionArgs* args) {
  return bytes_or_0([&] { return adaptive::cuda::gather_attention_workspace_bytes(*args); });
}
int64_t score_workspace_bytes(const adaptive::ScoreTokensArgs* args) {
  return bytes_or_0([&] { return adaptive::cuda::score_tokens_workspace_bytes(*args); });
}
int64_t select_workspace_bytes(const adaptive::SelectTokensArgs* args) {
  return bytes_or_0([&] { return adaptive::cuda::select_tokens_workspace_bytes(*args); });
}

int gather(const adaptive::GatherAttentionArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::gather_attention(*args, nullptr); });
}
int score(const adaptive::ScoreTokensArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::score_tokens(*args, nullptr); });
}
int select_keys(const adaptive::SelectTokensArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::select_tokens(*args, nullptr); });
}
int sum(const adaptive::SumTokensArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::sum_tokens(*args, nullptr); });
}

}  // extern "C"
