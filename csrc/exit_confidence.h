// exit_confidence: how sure the LM head is of each row's next token, without writing the logits.

#pragma once

#include <cstdint>

#include "common.h"
#include "skinny_linear.h"

namespace adaptive {

struct ExitConfidenceArgs {
  SkinnyLinearArgs linear;  // hidden is its input, vocab its out_features, at least 1; out is null
  float scale;              // factor on the logits
  float softcap;            // then softcap * tanh(logit / softcap); 0: not
  int64_t* tokens;          // [rows, 2], contiguous: of the largest logit and of the second
  float* top;               // [rows, 2], contiguous: these logits
  float* lse;               // [rows], contiguous
  float* entropy;           // [rows], contiguous; nats

  void* workspace;  // exit_confidence_workspace_bytes(args) bytes, 16-byte aligned; CUDA only
  int64_t workspace_bytes;
};

namespace cpu {

/// Each row's results depend on that row alone, and not on the number of threads, bit for bit.
void exit_confidence(const ExitConfidenceArgs& args);

}  // namespace cpu

namespace cuda {

/// Bytes of workspace for these sizes.
int64_t exit_confidence_workspace_bytes(const ExitConfidenceArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. A row's results depend on that row
/// alone. Throws if the workspace is too small or a launch is refused.
void exit_confidence(const ExitConfidenceArgs& args, Stream stream);

}  // namespace cuda
}  // namespace adaptive
