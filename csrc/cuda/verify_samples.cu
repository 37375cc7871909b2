// verify_samples on CUDA: one block for each row.
//
// Every warp looks at the drafted tokens itself, 32 at a time, which spares a barrier. Then each
// sums a sixteenth of the weights, the one that holds the draw is cut into sixteen again, and one
// warp goes through the last piece. Sums have one order, so results are the same from call to call.

#include "../verify_samples.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "../simt/simt.h"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 16, kThreads = kWarps * kLanes, kUnrolled = 4;
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

__device__ __forceinline__ bool is_weight(float x) { return x >= 0.0f && x <= kLargest; }
__device__ __forceinline__ bool is_uniform(float x) { return x >= 0.0f && x <= 1.0f; }

/// What a token is drawn from: max(p - q, 0), or p without a q; NaN where either is refused.
struct Weights {
  const float* p;
  const float* q;  // or null

  __device__ __forceinline__ double operator[](int token) const {
    const float mine = p[token], other = q ? q[token] : 0.0f;
    if (!is_weight(mine) || !is_weight(other)) return kNaN;
    const double left = static_cast<double>(mine) - static_cast<double>(other);
    return left > 0.0 ? left : 0.0;
  }
};

/// Where the draw lies, closer and closer.
struct Range {
  int begin, end;
  double before;  // sum of the weights before `begin`
};

/// Leaves the sums of sixteen equal pieces of the range, of which a warp each takes one.
__device__ void sum_pieces(const Weights& weights, const Range& range, int piece,
                           double (&sums)[kWarps]) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int begin = range.begin + warp * piece, end = min(begin + piece, range.end);
  double sum = 0.0;
  for (int first = begin + lane; first < end; first += kLanes * kUnrolled) {
    double weight[kUnrolled];
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int token = first + u * kLanes;
      weight[u] = token < end ? weights[token] : 0.0;
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) sum += weight[u];
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  __syncthreads();  // whoever still reads the sums of the range before
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
}

/// The piece in which the sum so far exceeds `bound`; else the last one that has any weight.
__device__ Range choose_piece(const Range& range, int piece, const double (&sums)[kWarps],
                              double bound) {
  Range chosen = range;
  double sum = range.before;
  bool found = false;
  for (int w = 0; w < kWarps; ++w) {
    if (!found && sums[w] > 0.0) {
      chosen.begin = range.begin + w * piece;
      chosen.end = min(chosen.begin + piece, range.end);
      chosen.before = sum;
      found = sum + sums[w] > bound;
    }
    sum += sums[w];
  }
  return chosen;
}

/// One warp finds the first token with which the sum exceeds `bound`, and which has any weight;
/// else the last that has.
__device__ int find_token(const Weights& weights, const Range& range, double bound) {
  const int lane = threadIdx.x % kLanes;
  double before = range.before;
  int last = -1;
  for (int first = range.begin; first < range.end; first += kLanes) {
    const int token = first + lane;
    const double weight = token < range.end ? weights[token] : 0.0;
    double sum = weight;  // of this lane and those below
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const double other = __shfl_sync(~0u, sum, lane - step);
      if (lane >= step) sum += other;
    }
    const unsigned fits = __ballot_sync(~0u, weight > 0.0 && before + sum > bound);
    if (fits != 0) return first + __ffs(static_cast<int>(fits)) - 1;
    if (weight > 0.0) last = token;
    before += __shfl_sync(~0u, sum, kLanes - 1);
  }
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    last = max(last, __shfl_xor_sync(~0u, last, lanes));
  }
  return last;
}

/// Counts the accepted nodes into `accepted`; false if a token, uniform or probability is refused.
__device__ bool accept(const VerifySamplesArgs& a, int64_t row, int64_t length, int64_t& accepted) {
  const int64_t* drafted = a.drafted + row * a.drafted_stride;
  const float* uniforms = a.uniforms + row * a.uniforms_stride;
  bool fine = is_uniform(uniforms[a.nodes]);
  accepted = length;
  for (int64_t first = 0; first < length; first += kLanes) {
    const int64_t node = first + threadIdx.x % kLanes;
    bool good = true, stops = false;
    if (node < length) {
      const int64_t token = drafted[node];
      good = token >= 0 && token < a.vocab && is_uniform(uniforms[node]);
      if (good) {
        const float p =
            a.target_probs[row * a.target_stride[0] + node * a.target_stride[1] + token];
        const float q = a.draft_probs[row * a.draft_stride[0] + node * a.draft_stride[1] + token];
        good = is_weight(p) && is_weight(q);
        stops = !(static_cast<double>(uniforms[node]) * static_cast<double>(q) <
                  static_cast<double>(p));
      }
    }
    fine = __ballot_sync(~0u, !good) == 0 && fine;
    const unsigned stopping = __ballot_sync(~0u, stops);
    if (stopping != 0 && accepted == length) {
      accepted = first + __ffs(static_cast<int>(stopping)) - 1;
    }
  }
  return fine;
}

__global__ void __launch_bounds__(kThreads)
    sample_draft(const __grid_constant__ VerifySamplesArgs a) {
  SHARED(double[kWarps], sums);
  const int64_t row = blockIdx.x;
  const int64_t length = a.lengths ? a.lengths[row] : a.nodes;
  int64_t accepted = 0;
  bool fine = length >= 0 && length <= a.nodes;
  fine = fine && accept(a, row, length, accepted);
  int drawn = -1;
  if (fine) {
    Weights weights{a.target_probs + row * a.target_stride[0] + accepted * a.target_stride[1],
                    a.draft_probs + row * a.draft_stride[0] + accepted * a.draft_stride[1]};
    if (accepted == length) weights.q = nullptr;
    Range range{0, static_cast<int>(a.vocab), 0.0};
    int piece = (range.end + kWarps - 1) / kWarps;
    double total = 0.0;
    for (;;) {
      sum_pieces(weights, range, piece, sums);
      total = 0.0;
      for (int w = 0; w < kWarps; ++w) total += sums[w];
      if (total != 0.0 || !weights.q) break;
      weights.q = nullptr;
    }
    if (total > 0.0) {
      const double bound =
          static_cast<double>(a.uniforms[row * a.uniforms_stride + a.nodes]) * total;
      range = choose_piece(range, piece, sums, bound);
      piece = (range.end - range.begin + kWarps - 1) / kWarps;
      sum_pieces(weights, range, piece, sums);
      range = choose_piece(range, piece, sums, bound);
      drawn = find_token(weights, range, bound);
    }
  }
  if (drawn < 0) accepted = -1;
  if (threadIdx.x == 0) a.accepted[row] = accepted;
  for (int64_t i = threadIdx.x; i <= a.nodes; i += kThreads) {
    const int64_t after = drawn >= 0 && i == accepted ? drawn : -1;
    a.tokens[row * (a.nodes + 1) + i] =
        i < accepted ? a.drafted[row * a.drafted_stride + i] : after;
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::verify_samples: " + what);
}

}  // namespace

void verify_samples(const VerifySamplesArgs& args, Stream stream) {
  if (args.batch == 0) return;
  if (args.batch > INT32_MAX) refuse("batch must be at most 2^31 - 1");
  if (args.vocab < 1 || args.vocab > int64_t{1} << 30) {
    refuse("target_probs must have 1..2^30 tokens on CUDA, got " + std::to_string(args.vocab));
  }
  simt::launch<sample_draft>("verify_samples", dim3(static_cast<unsigned>(args.batch)),
                             dim3(kThreads), 0, stream, args);
}

}  // namespace adaptive::cuda
