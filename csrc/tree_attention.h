// tree_attention: the nodes of a token tree attend to a KV cache that ends with their own keys.
//
// decode_attention (decode_attention.h) with parents: the last query_tokens keys of a row are those
// of the nodes, in order; node i sees the keys before them, its own and those of its ancestors. The
// mask, if there is one, excludes keys of both kinds. On the CPU, cpu::decode_attention does it.

#pragma once

#include "decode_attention.h"

namespace adaptive::cuda {

/// Bytes of workspace that tree_attention wants for these sizes on the current device.
int64_t tree_attention_workspace_bytes(const DecodeAttentionArgs& args);

/// Enqueues on `stream` and returns at once; capture-safe. A parent outside -1..i-1 counts as -1.
/// Takes no lengths. Throws if a launch is refused.
void tree_attention(const DecodeAttentionArgs& args, Stream stream);

}  // namespace adaptive::cuda
