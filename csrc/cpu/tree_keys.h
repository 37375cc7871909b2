// Which keys the nodes of a token tree see: those before the tree, and their ancestors' own.

#pragma once

#include "cpu/decode_attention_kernel.h"

namespace adaptive::cpu {
namespace {

class TreeKeys {
 public:
  TreeKeys(const DecodeAttentionArgs& args, int64_t batch, int64_t length)
      : first_node_(length - args.query_tokens) {
    if (args.parents == nullptr) return;
    const int64_t* parents = args.parents + batch * args.query_tokens;
    for (int64_t node = 0; node < args.query_tokens; ++node) {  // a node follows its parent
      const uint64_t above = parents[node] < 0 ? 0 : ancestors_[parents[node]];
      ancestors_[node] = above | uint64_t{1} << node;
    }
  }

  /// Bit i: the node sees key first + i, of 64 keys.
  uint64_t seen(int64_t node, int64_t first) const {
    const int64_t before = first_node_ - first;  // of the keys come before the tree
    if (before >= kBlockKeys) return ~uint64_t{0};
    if (before < 0) return ancestors_[node] >> -before;
    return ancestors_[node] << before | ((uint64_t{1} << before) - 1);
  }

 private:
  const int64_t first_node_;             // where the key of node 0 lies
  uint64_t ancestors_[kMostNodes] = {};  // bit j: node j is an ancestor, or the node itself
};

}  // namespace
}  // namespace adaptive::cpu
