// The keys of tree_attention: those before the tree, which every node sees, then the nodes' own, of
// which a node sees its ancestors.

#pragma once

#include "../tree_attention.h"
#include "key_ring.cuh"

namespace adaptive::cuda {

class TreeKeys;

struct TreeProblem : Problem {
  using Keys = TreeKeys;
};

/// Launches the tensor-core kernels, for the 2-byte element types.
void attend_half(const char* op, const TreeProblem& p, Stream stream);

/// Lane i of every warp finds the ancestors of node i, by pointer doubling: each round looks as far
/// up again. No memory is read but the parents, once, and nothing is written.
class TreeKeys : public AllKeys {
  static constexpr int kMostNodes = 16;

 public:
  struct Sight : cuda::Sight {  // its limit is where the nodes' keys begin
    uint32_t nodes;             // bit j: node j is an ancestor, or the row's own

    __device__ Sight() {}
    __device__ Sight(const cuda::Sight& all, uint32_t nodes) : cuda::Sight(all), nodes(nodes) {}
  };

  __device__ TreeKeys(const Problem& p, const Share& share, void* shared)
      : AllKeys(p, share, shared) {
    const int lane = threadIdx.x % kLanes, nodes = static_cast<int>(p.args.query_tokens);
    parent_ = lane < nodes ? p.args.parents[share.batch * nodes + lane] : -1;
  }

  /// All lanes of a warp call this; by then the first tiles are on their way.
  __device__ __forceinline__ Sight sight(const Problem& p, const Share& share, const Row& row) {
    if (ancestors_ == 0) find_ancestors();
    const uint32_t nodes = __shfl_sync(~0u, ancestors_, row.token);
    Sight made(cuda::Sight(p.args, share, row), row.exists ? nodes : 0);
    made.limit = row.exists ? first_node(p, share) : 0;
    return made;
  }

  /// Below this slot every row sees every key, without anything added to its score.
  __device__ int common(const Problem& p, const Share& share) const {
    return p.args.mask ? 0 : first_node(p, share);
  }
  /// Whether a key of this tile may have weight 0 in every row, but an infinite or NaN value.
  __device__ bool may_hide(const Problem& p, const Share& share, int first) const {
    return p.args.mask || first + p.plan.tile_keys > first_node(p, share);
  }
  /// The score of key `k` of the tile of slot `first`, with what is added to it; -inf if unseen.
  __device__ __forceinline__ float see(const Problem& p, const Share&, const Sight& sight,
                                       float score, int first, int k) const {
    const int node = first + k - sight.limit;
    const bool unseen = node >= kMostNodes || (node >= 0 && (sight.nodes >> node & 1) == 0);
    return unseen ? -kInfinity : sight.masked(p.args, score, first + k);
  }

 private:
  __device__ __forceinline__ void find_ancestors() {
    const int lane = threadIdx.x % kLanes;
    int up = parent_ >= 0 && parent_ < lane ? static_cast<int>(parent_) : -1;
    ancestors_ = 1u << lane;
#pragma unroll
    for (int seen = 1; seen < kMostNodes; seen *= 2) {
      const int from = up < 0 ? lane : up;
      ancestors_ |= __shfl_sync(~0u, ancestors_, from);
      up = __shfl_sync(~0u, up, from);
    }
  }

  __device__ static int first_node(const Problem& p, const Share& share) {
    return share.length - static_cast<int>(p.args.query_tokens);
  }

  int64_t parent_;          // of the node of this lane, as given
  uint32_t ancestors_ = 0;  // of the node of this lane, itself included, once found
};

}  // namespace adaptive::cuda
