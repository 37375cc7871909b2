// verify_draft on CUDA: one warp for each row.
//
// A lane holds a node, its parent and the choice after it, so that a step of the walk is a vote and
// a shuffle, and waits for no memory. What follows a node comes after it: 32 nodes are done before
// the next 32 are looked at.

#include "../verify_draft.h"

#include <stdexcept>
#include <string>

#include "../simt/simt.h"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 4;

__global__ void __launch_bounds__(kWarps* kLanes)
    walk_draft(const __grid_constant__ VerifyDraftArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (row >= a.batch) return;
  const int lane = threadIdx.x % kLanes;
  const int64_t* drafted = a.drafted + row * a.drafted_stride;
  const int64_t* choices = a.choices + row * a.choices_stride;
  const int64_t* parents = a.parents ? a.parents + row * a.nodes : nullptr;
  const int64_t length = a.lengths ? a.lengths[row] : a.nodes;
  const bool valid = length >= 0 && length <= a.nodes;
  int64_t* path = a.path + row * (a.nodes + 1);
  int64_t* tokens = a.tokens + row * (a.nodes + 1);

  int64_t accepted = 0, here = -1, choice = choices[0];
  for (int64_t first = 0; valid && first < length; first += kLanes) {
    const int64_t node = first + lane;
    const bool real = node < length;
    int64_t parent = node - 1, token = 0, after = 0;
    if (real) {
      token = drafted[node];
      after = choices[node + 1];
      if (parents) parent = parents[node];
      if (parent < -1 || parent >= node) parent = -1;
    }
    for (;;) {
      const unsigned fits =
          __ballot_sync(~0u, real && node > here && parent == here && token == choice);
      if (fits == 0) break;
      const int next = __ffs(static_cast<int>(fits)) - 1;
      if (lane == 0) path[accepted] = first + next;
      if (lane == 0) tokens[accepted] = choice;
      here = first + next;
      choice = __shfl_sync(~0u, after, next);
      ++accepted;
    }
  }

  if (lane == 0) a.accepted[row] = valid ? accepted : -1;
  for (int64_t i = accepted + lane; i <= a.nodes; i += kLanes) {
    path[i] = -1;
    tokens[i] = valid && i == accepted ? choice : -1;
  }
}

}  // namespace

void verify_draft(const VerifyDraftArgs& args, Stream stream) {
  if (args.batch == 0) return;
  const int64_t blocks = (args.batch + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("adaptive::verify_draft: batch must be at most 2^33, got " +
                                std::to_string(args.batch));
  }
  simt::launch<walk_draft>("verify_draft", dim3(static_cast<unsigned>(blocks)),
                           dim3(kWarps * kLanes), 0, stream, args);
}

}  // namespace adaptive::cuda
