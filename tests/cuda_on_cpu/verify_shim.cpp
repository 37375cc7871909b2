// The CUDA entry points of ops on drafted tokens, compiled for the CPU and callable by ctypes.

#include <cstdint>

#include "guarded.h"
#include "simt/simt.h"
#include "verify_draft.h"
#include "verify_samples.h"

extern "C" {

int64_t draft_args_bytes() { return sizeof(adaptive::VerifyDraftArgs); }

void set_seed(unsigned seed) { simt::host::seed() = seed; }

int verify_draft(const adaptive::VerifyDraftArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::verify_draft(*args, nullptr); });
}

int64_t samples_args_bytes() { return sizeof(adaptive::VerifySamplesArgs); }

int verify_samples(const adaptive::VerifySamplesArgs* args, char* error) {
  return guarded(error, [&] { adaptive::cuda::verify_samples(*args, nullptr); });
}

}  // extern "C"
