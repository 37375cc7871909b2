// merge_tokens on CUDA: three kernels, for the best pairs, for who goes where, and for the means.
//
// A warp has one source, and its lanes 32 targets at a time, whose metric lies in shared memory.
// Then a block per row ranks the sources by counting those before them, and numbers what stays.
// At the end a block per slot finds its members by votes, in order, so that sums have one order.

#include "../merge_tokens.h"

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../simt/simt.h"

namespace adaptive::cuda {
namespace {

constexpr int kLanes = 32, kWarps = 8, kThreads = kLanes * kWarps;
constexpr int kChunk = 64;  // features of the metric in shared memory
constexpr int kMeanThreads = 128;
constexpr float kLeastNorm = 1e-12f, kNoCosine = -2.0f;
constexpr int64_t kPadding = -1, kGoes = -2;  // and below: into target kGoes - x

struct MergeProblem {
  MergeTokensArgs args;
  int64_t kept;
  int64_t first_source, first_target;
  int64_t most_sources;  // of a row without padding
  float* best;           // [batch, most_sources]: cosine of each source with its best target
  int32_t* target;       // [batch, most_sources]: that target's number
};

struct Row {
  int64_t length, sources, targets, pairs;
};

/// See MergeTokensArgs::pairs, which cannot run here.
__device__ Row row_of(const MergeProblem& p, int64_t row) {
  const MergeTokensArgs& a = p.args;
  Row r{a.tokens, 0, 0, 0};
  if (a.lengths) {
    r.length = max(int64_t{0}, min(static_cast<int64_t>(a.lengths[row]), a.tokens));
  }
  if (r.length > p.first_source) r.sources = (r.length - p.first_source + 1) / 2;
  if (r.length > p.first_target) r.targets = (r.length - p.first_target + 1) / 2;
  const int64_t asked = a.counts ? static_cast<int64_t>(a.counts[row]) : a.removed;
  const int64_t wanted = max(max(asked, r.length - p.kept), int64_t{0});
  r.pairs = min(wanted, r.targets > 0 ? r.sources : int64_t{0});
  return r;
}

template <class T>
__global__ void __launch_bounds__(kThreads) match_sources(const __grid_constant__ MergeProblem p) {
  const MergeTokensArgs& a = p.args;
  const int64_t pieces = (p.most_sources + kWarps - 1) / kWarps;
  const int64_t row = blockIdx.x / pieces, first = (blockIdx.x - row * pieces) * kWarps;
  const Row r = row_of(p, row);
  if (r.pairs == 0 || first >= r.sources) return;  // the whole block
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const T* metric = static_cast<const T*>(a.metric) + row * a.metric_stride[0];

  SHARED(float[kWarps][kChunk], own);
  SHARED(float[kLanes][kChunk + 1], others);  // a column more: lanes read 32 rows at once
  float best = 0.0f, norm = 0.0f;
  int64_t found = -1;
  for (int64_t tile = 0; tile < r.targets; tile += kLanes) {
    float product = 0.0f, other_norm = 0.0f;
    norm = 0.0f;
    for (int64_t column = 0; column < a.metric_width; column += kChunk) {
      __syncthreads();
      for (int i = threadIdx.x; i < (kWarps + kLanes) * kChunk; i += kThreads) {
        const int line = i / kChunk, c = i % kChunk;
        const bool is_own = line < kWarps;
        const int64_t number = is_own ? first + line : tile + line - kWarps;
        const bool exists =
            number < (is_own ? r.sources : r.targets) && column + c < a.metric_width;
        const int64_t token = (is_own ? p.first_source : p.first_target) + 2 * number;
        const float x =
            exists ? simt::to_float(metric[token * a.metric_stride[1] + column + c]) : 0.0f;
        if (is_own) {
          own[line][c] = x;
        } else {
          others[line - kWarps][c] = x;
        }
      }
      __syncthreads();
#pragma unroll 8
      for (int c = 0; c < kChunk; ++c) {
        const float x = own[warp][c], y = others[lane][c];
        product += x * y;
        other_norm += y * y;
        norm += x * x;
      }
    }
    const int64_t number = tile + lane;
    float cosine = product / max(sqrtf(other_norm), kLeastNorm) / max(sqrtf(norm), kLeastNorm);
    if (cosine != cosine) cosine = kNoCosine;
    if (number < r.targets && (found < 0 || cosine > best)) {
      best = cosine;
      found = number;
    }
  }
  for (int other = kLanes / 2; other > 0; other /= 2) {
    const float their_best = __shfl_xor_sync(~0u, best, other);
    const int64_t theirs = __shfl_xor_sync(~0u, found, other);
    const bool better = found < 0 || their_best > best || (their_best == best && theirs < found);
    if (theirs >= 0 && better) {
      best = their_best;
      found = theirs;
    }
  }
  if (lane == 0 && first + warp < r.sources) {
    p.best[row * p.most_sources + first + warp] = best;
    p.target[row * p.most_sources + first + warp] = static_cast<int32_t>(found);
  }
}

__global__ void __launch_bounds__(kThreads) place_tokens(const __grid_constant__ MergeProblem p) {
  const MergeTokensArgs& a = p.args;
  const int64_t row = blockIdx.x;
  const Row r = row_of(p, row);
  const float* best = p.best + row * p.most_sources;
  int64_t* groups = a.groups + row * a.tokens;
  for (int64_t t = threadIdx.x; t < a.tokens; t += kThreads) {
    int64_t group = t < r.length ? 0 : kPadding;
    const int64_t source = t - p.first_source;
    if (r.pairs > 0 && t < r.length && source >= 0 && source % 2 == 0) {
      const float mine = best[source / 2];
      int64_t rank = 0;
      for (int64_t i = 0; i < r.sources; ++i) {
        rank += best[i] > mine || (best[i] == mine && i < source / 2);
      }
      if (rank < r.pairs) group = kGoes - p.target[row * p.most_sources + source / 2];
    }
    groups[t] = group;
  }
  __syncthreads();

  SHARED(int[kThreads], stay);
  const int64_t share = (a.tokens + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * share, end = min(begin + share, r.length);
  int count = 0;
  for (int64_t t = begin; t < end; ++t) count += groups[t] >= 0;
  stay[threadIdx.x] = count;
  __syncthreads();
  int64_t slot = 0;
  for (unsigned i = 0; i < threadIdx.x; ++i) slot += stay[i];
  for (int64_t t = begin; t < end; ++t) {
    if (groups[t] >= 0) groups[t] = slot++;
  }
  __syncthreads();
  for (int64_t t = begin; t < end; ++t) {
    if (groups[t] <= kGoes) groups[t] = groups[p.first_target + 2 * (kGoes - groups[t])];
  }
}

template <class T>
__device__ T rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return simt::from_float<T>(x);
  }
}

template <class T>
__global__ void __launch_bounds__(kMeanThreads) average(const __grid_constant__ MergeProblem p) {
  const MergeTokensArgs& a = p.args;
  const int64_t place = blockIdx.x, row = place / p.kept, slot = place - row * p.kept;
  const int lane = threadIdx.x % kLanes;
  const int64_t* groups = a.groups + row * a.tokens;
  const float* sizes = a.sizes ? a.sizes + row * a.tokens : nullptr;
  const T* hidden = static_cast<const T*>(a.hidden) + row * a.hidden_stride[0];
  T* out = static_cast<T*>(a.out) + place * a.width;

  float total = 0.0f;
  int64_t members = 0, last = 0;
  // Once at least: rows of no features have sizes, too.
  for (int64_t column = threadIdx.x; column < kMeanThreads || column - threadIdx.x < a.width;
       column += kMeanThreads) {
    float sum = 0.0f;
    total = 0.0f;
    members = 0;
    for (int64_t tile = 0; tile < a.tokens; tile += kLanes) {
      unsigned found = __ballot_sync(~0u, tile + lane < a.tokens && groups[tile + lane] == slot);
      for (; found != 0; found &= found - 1) {
        last = tile + __ffs(static_cast<int>(found)) - 1;
        const float size = sizes ? sizes[last] : 1.0f;
        total += size;
        ++members;
        if (column < a.width) {
          sum += size * simt::to_float(hidden[last * a.hidden_stride[1] + column]);
        }
      }
    }
    if (column >= a.width) continue;
    if (members == 1) {
      out[column] = hidden[last * a.hidden_stride[1] + column];
    } else {
      out[column] = rounded<T>(members == 0 ? 0.0f : sum / total);
    }
  }
  if (threadIdx.x == 0) a.out_sizes[place] = total;
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::merge_tokens: " + what);
}

template <class T>
void launch(const MergeProblem& p, Stream stream) {
  const MergeTokensArgs& a = p.args;
  const int64_t pieces = a.batch * ((p.most_sources + kWarps - 1) / kWarps);
  const int64_t slots = a.batch * p.kept;
  if (pieces > INT32_MAX || slots > INT32_MAX) {
    refuse("batch must be smaller: too many thread blocks");
  }
  if (pieces > 0) {
    simt::launch<match_sources<T>>("merge_tokens", dim3(static_cast<unsigned>(pieces)),
                                   dim3(kThreads), 0, stream, p);
  }
  simt::launch<place_tokens>("merge_tokens", dim3(static_cast<unsigned>(a.batch)), dim3(kThreads),
                             0, stream, p);
  simt::launch<average<T>>("merge_tokens", dim3(static_cast<unsigned>(slots)), dim3(kMeanThreads),
                           0, stream, p);
}

}  // namespace

int64_t merge_tokens_workspace_bytes(const MergeTokensArgs& args) {
  return args.batch * args.sources(args.tokens) * 8;
}

void merge_tokens(const MergeTokensArgs& args, Stream stream) {
  if (args.batch == 0 || args.tokens == 0) return;
  const int64_t bytes = merge_tokens_workspace_bytes(args);
  if (args.workspace_bytes < bytes) {
    refuse("workspace must have " + std::to_string(bytes) + " bytes, got " +
           std::to_string(args.workspace_bytes));
  }
  const int64_t sources = args.sources(args.tokens);
  auto* best = static_cast<float*>(args.workspace);
  auto* target = reinterpret_cast<int32_t*>(best + args.batch * sources);
  const MergeProblem p{args, args.kept(), args.first_source(), args.first_target(), sources,
                       best, target};
  switch (args.dtype) {
    case DType::kFloat32: return launch<float>(p, stream);
    case DType::kFloat16: return launch<simt::float16>(p, stream);
    case DType::kBfloat16: return launch<simt::bfloat16>(p, stream);
    default: refuse("hidden must be float32, float16 or bfloat16");
  }
}

}  // namespace adaptive::cuda
