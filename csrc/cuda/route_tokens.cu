// route_tokens on CUDA: one block for each row.
//
// A capacity is turned into a limit by four passes of histograms, eight bits of each key, in shared
// memory. From then on both forms are the same: every warp takes one stretch of the row, counts
// what it takes, and writes it where the warps before it end. So the order is that of positions,
// nothing depends on which thread comes first, and nothing waits for the host.

#include "../route_tokens.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"
#include "select_tokens.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 16, kThreads = kWarps * kLanes;
constexpr int kDigits = 4, kDigit = 8, kDigitBins = 1 << kDigit;
constexpr int kLaneBins = kDigitBins / kLanes;
constexpr int kLoads = 4;  // scores of a thread in flight

/// Higher keys are taken, and the first `equals` of those that equal it.
struct Border {
  uint32_t key;
  int equals;
};

/// What a warp, or all of them, found.
struct Found {
  int above, equal;
};

struct Row {
  const float* scores;
  const bool* valid;  // or null
  int tokens;

  __device__ __forceinline__ bool has(int token) const { return valid == nullptr || valid[token]; }

  /// Calls visit(token, score) for every valid token, each from some thread of the block.
  template <class Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
    for (int first = threadIdx.x; first < tokens; first += kThreads * kLoads) {
      float score[kLoads];
      bool here[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int token = first + u * kThreads;
        here[u] = token < tokens && has(token);
        score[u] = here[u] ? scores[token] : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        if (here[u]) visit(first + u * kThreads, score[u]);
      }
    }
  }
};

/// Of the bins from the highest on, the one in which their sum reaches `rest`; `rest` becomes what
/// is still to be reached in it. Every warp finds the same.
__device__ __forceinline__ int find_digit(const int (&bins)[kDigitBins], int& rest) {
  const int lane = threadIdx.x % kLanes, first = kDigitBins - 1 - lane * kLaneBins;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kLaneBins; ++i) own += bins[first - i];
  int sum = own;  // of this lane and those below
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int other = __shfl_sync(~0u, sum, lane - step);
    if (lane >= step) sum += other;
  }
  int digit = first, left = rest - (sum - own);
  const unsigned reached = __ballot_sync(~0u, sum >= rest);
  if (sum >= rest && left > 0) {
    while (left > bins[digit]) left -= bins[digit--];
  }
  const int source = __ffs(static_cast<int>(reached)) - 1;
  rest = __shfl_sync(~0u, left, source);
  return __shfl_sync(~0u, digit, source);
}

/// The border below which all but the `room` highest of the row lie; fewer than there are.
__device__ Border highest(const Row& row, int room, int (&bins)[kDigits][kDigitBins]) {
  uint32_t key = 0;
  int rest = room;
#pragma unroll
  for (int pass = 0; pass < kDigits; ++pass) {
    const int shift = 32 - kDigit * (pass + 1);
    const uint32_t known = pass == 0 ? 0u : ~0u << (shift + kDigit);
    row.each([&](int, float score) {
      const uint32_t own = key_of(score);
      if (((own ^ key) & known) == 0) atomicAdd(&bins[pass][own >> shift & (kDigitBins - 1)], 1);
    });
    __syncthreads();
    key |= static_cast<uint32_t>(find_digit(bins[pass], rest)) << shift;
  }
  return {key, rest};
}

/// Calls visit(token, above, equal) for each token of [begin, end), by its lane; every lane of the
/// warp takes part each time, with a token that is neither where the stretch has ended.
template <class Visit>
__device__ __forceinline__ void walk(const Row& row, int begin, int end, uint32_t border,
                                     const Visit& visit) {
  for (int first = begin; first < end; first += kLanes * kLoads) {
    uint32_t key[kLoads];
    bool here[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int token = first + u * kLanes + static_cast<int>(threadIdx.x) % kLanes;
      here[u] = token < end && row.has(token);
      key[u] = here[u] ? key_of(row.scores[token]) : 0;
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int token = first + u * kLanes + static_cast<int>(threadIdx.x) % kLanes;
      visit(token, here[u] && key[u] > border, here[u] && key[u] == border);
    }
  }
}

__global__ void __launch_bounds__(kThreads) route_rows(const __grid_constant__ RouteTokensArgs a) {
  SHARED(int[kDigits][kDigitBins], bins);
  SHARED(int[kWarps], present);
  SHARED(bool[kWarps], refused);
  SHARED(Found[kWarps], found);
  const int64_t batch = blockIdx.x;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const Row row{a.scores + batch * a.scores_stride,
                a.valid == nullptr ? nullptr : a.valid + batch * a.valid_stride,
                static_cast<int>(a.tokens)};

  for (int i = threadIdx.x; i < kDigits * kDigitBins; i += kThreads) {
    bins[i / kDigitBins][i % kDigitBins] = 0;
  }
  int count = 0;
  bool bad = false;
  row.each([&](int, float score) {
    ++count;
    bad = bad || score != score;
  });
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) count += __shfl_xor_sync(~0u, count, lanes);
  bad = __ballot_sync(~0u, bad) != 0;
  if (lane == 0) {
    present[warp] = count;
    refused[warp] = bad;
  }
  __syncthreads();
  count = 0;
  bad = false;
  for (int w = 0; w < kWarps; ++w) {
    count += present[w];
    bad = bad || refused[w];
  }

  Border border{0, row.tokens};  // all that are valid: no number has the key 0
  if (bad) {
    border = {~0u, 0};
  } else if (a.capacity == 0 && a.share == 0.0) {  // by_threshold(), which is the host's
    border.key = key_of(a.threshold);
  } else {
    int64_t room = a.capacity;
    if (room == 0) {
      const auto share = static_cast<int64_t>(a.share * static_cast<double>(count));
      room = share > 1 ? share : 1;
    }
    if (room < count) border = highest(row, static_cast<int>(room), bins);
  }

  const int piece = (row.tokens + kThreads - 1) / kThreads * kLanes;
  const int begin = min(warp * piece, row.tokens), end = min(begin + piece, row.tokens);
  Found own{0, 0};
  walk(row, begin, end, border.key, [&](int, bool above, bool equal) {
    own.above += __popc(__ballot_sync(~0u, above));
    own.equal += __popc(__ballot_sync(~0u, equal));
  });
  if (lane == 0) found[warp] = own;
  __syncthreads();
  Found before{0, 0}, all{0, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = all;
    all.above += found[w].above;
    all.equal += found[w].equal;
  }

  int32_t* list = a.list + batch * a.tokens;
  int32_t* slots = a.slots + batch * a.tokens;
  const unsigned below = (1u << lane) - 1;
  walk(row, begin, end, border.key, [&](int token, bool above, bool equal) {
    const unsigned highs = __ballot_sync(~0u, above), ties = __ballot_sync(~0u, equal);
    const int ahead = before.equal + __popc(ties & below);
    const bool taken = above || (equal && ahead < border.equals);
    const int slot = before.above + __popc(highs & below) + min(ahead, border.equals);
    if (taken) list[slot] = token;
    if (token < end) slots[token] = taken ? slot : -1;
    before.above += __popc(highs);
    before.equal += __popc(ties);
  });
  const int routed = all.above + min(all.equal, border.equals);
  for (int i = routed + static_cast<int>(threadIdx.x); i < row.tokens; i += kThreads) list[i] = -1;
  if (threadIdx.x == 0) a.counts[batch] = bad ? -1 : routed;
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::route_tokens: " + what);
}

}  // namespace

void route_tokens(const RouteTokensArgs& args, Stream stream) {
  if (args.batch == 0) return;
  if (args.batch > INT32_MAX) refuse("batch must be at most 2^31 - 1");
  if (args.tokens > int64_t{1} << 30) refuse("scores must have at most 2^30 tokens");
  simt::launch<route_rows>("route_tokens", dim3(static_cast<unsigned>(args.batch)), dim3(kThreads),
                           0, stream, args);
}

}  // namespace adaptive::cuda
