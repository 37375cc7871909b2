// How an attention problem is cut into thread blocks, for every op on these kernels. Host code.

#pragma once

#include "decode_attention.cuh"

namespace adaptive::cuda {

/// What an op asks of the attention kernels, beside its arguments.
struct Work {
  const char* op;         // for messages
  int64_t keys;           // of one KV head, at most
  int64_t extra = 0;      // tokens besides, in tiles of their own
  bool listed = false;    // where keys lie is read from a list
  bool values = true;     // there are values to add up
  int64_t row_bytes = 0;  // of workspace for each row, before the partial results
};

/// Bytes of workspace: row_bytes for each row, then the partial results of the splits.
int64_t workspace_bytes(const Work& work, const DecodeAttentionArgs& args);

/// Cuts the problem and lays out the workspace; refuses what does not fit.
Problem make_problem(const Work& work, const DecodeAttentionArgs& args);

/// One block per row block, split and KV head.
dim3 attend_grid(const Problem& p);

/// Whether there is any row to compute.
bool is_empty(const DecodeAttentionArgs& args);

/// True if every row starts on a 16-byte boundary.
bool is_wide(const void* base, const int64_t (&stride)[3], DType dtype);

/// Throws: adaptive::<op>: <what>.
[[noreturn]] void refuse(const char* op, const std::string& what);

/// Merges the partial results of the splits, if there are any, into lse and, unless null, out.
void merge_splits(const char* op, const Problem& p, Stream stream);

/// Calls run.template operator()<D>() for the padded head size.
template <class Run>
void with_head_dim(const Plan& plan, const Run& run) {
  switch (plan.padded_head_dim) {
    case 64: return run.template operator()<64>();
    case 128: return run.template operator()<128>();
    default: return run.template operator()<256>();
  }
}

}  // namespace adaptive::cuda
