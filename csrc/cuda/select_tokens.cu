// select_tokens on CUDA: a radix selection by histograms of 11, 11 and 10 bits of the scores' keys,
// then a count and a write in the order of positions.
//
// Several blocks read each line. The last of them to add its histogram finds the digit at which
// the highest keys reach their number and, in the same pass, the digit at which they reach their
// share of the weight: whichever asks for less decides. Weights are whole numbers, so no order of
// additions changes the result. Nothing here waits for the host, or knows the contents beforehand.

#include "select_tokens.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "select_tokens_digits.cuh"

namespace adaptive::cuda {
namespace {

/// One block per line: finds the forced keys and clears what the others add to.
__global__ void __launch_bounds__(kSelectThreads) prepare(const __grid_constant__ Selection s) {
  const SelectTokensArgs& a = s.args;
  const int line = blockIdx.x, thread = threadIdx.x;
  const float* scores = scores_of(s, line);
  const int capacity = static_cast<int>(a.capacity);
  int length = a.lengths ? a.lengths[line / a.kv_heads] : capacity;
  const bool refused = length < 0 || length > capacity;
  if (refused) length = 0;

  SHARED(int, first);
  SHARED(int, forced);
  if (thread == 0) {
    first = length;
    forced = 0;
  }
  __syncthreads();
  for (int base = 0; base < length; base += kSelectThreads) {
    const int i = base + thread;
    if (i < length && scores[i] != kMinusInfinity) atomicMin(&first, i);
    __syncthreads();
    const bool found = first < base + kSelectThreads;
    __syncthreads();  // before anyone lowers `first` again
    if (found) break;
  }
  const int begin = first + min(static_cast<int>(a.sinks), length - first);
  const int end = max(begin, length - static_cast<int>(a.recent));
  int own = 0;
  for (int i = first + thread; i < begin; i += kSelectThreads) own += scores[i] != kMinusInfinity;
  for (int i = end + thread; i < length; i += kSelectThreads) own += scores[i] != kMinusInfinity;
  if (own > 0) atomicAdd(&forced, own);
  __syncthreads();

  for (int i = thread; i < kBins; i += kSelectThreads) {
    s.bins[int64_t{line} * kBins + i] = 0;
    if (a.mass < 1) s.weights[int64_t{line} * kBins + i] = 0;
  }
  if (thread != 0) return;
  Line made{};
  made.length = length;
  made.begin = begin;
  made.end = end;
  made.forced = forced;
  made.refused = refused;
  s.lines[line] = made;
}

/// Finds the largest score of each line, and scores that have no share.
__global__ void __launch_bounds__(kSelectThreads) measure(const __grid_constant__ Selection s) {
  const int line = blockIdx.x / s.chunks;
  Line& state = s.lines[line];
  SHARED(uint32_t, largest);
  SHARED(uint32_t, refused);
  if (threadIdx.x == 0) largest = refused = 0;
  __syncthreads();
  uint32_t own = 0;
  bool bad = false;
  visit_chunk(s, line, state.length, [&](int, float score) {
    if (score >= 0 && score < -kMinusInfinity) {
      own = max(own, __float_as_uint(score + 0.0f));
    } else {
      bad = true;
    }
  });
  if (own > 0) atomicMax(&largest, own);
  if (bad) atomicMax(&refused, 1u);
  __syncthreads();
  if (threadIdx.x != 0) return;
  atomicMax(&state.largest, largest);
  if (refused) atomicMax(&state.refused, 1u);
}

/// 1 where a score is chosen for its place or its key, 1 << 16 where it equals the key.
__device__ __forceinline__ int judge(const Line& state, int position, float score) {
  if (score == kMinusInfinity) return 0;
  if (position < state.begin || position >= state.end) return 1;
  const uint32_t key = key_of(score);
  return key > state.key ? 1 : key == state.key ? 1 << 16 : 0;
}

/// Counts what each chunk has to write.
__global__ void __launch_bounds__(kSelectThreads) count(const __grid_constant__ Selection s) {
  const int line = blockIdx.x / s.chunks;
  const Line& state = s.lines[line];
  SHARED(int, above);
  SHARED(int, equal);
  if (threadIdx.x == 0) above = equal = 0;
  __syncthreads();
  Tally own{};
  visit_chunk(s, line, state.refused ? 0 : state.length, [&](int position, float score) {
    const int judged = judge(state, position, score);
    own.above += judged & 1;
    own.equal += judged >> 16;
  });
  if (own.above > 0) atomicAdd(&above, own.above);
  if (own.equal > 0) atomicAdd(&equal, own.equal);
  __syncthreads();
  if (threadIdx.x == 0) s.tallies[blockIdx.x] = {above, equal};
}

/// Writes the positions of each chunk behind those of the chunks before it.
__global__ void __launch_bounds__(kSelectThreads) write(const __grid_constant__ Selection s) {
  const int line = blockIdx.x / s.chunks, own = blockIdx.x % s.chunks, thread = threadIdx.x;
  const Line& state = s.lines[line];
  const int width = static_cast<int>(s.args.width);
  int32_t* indices = s.args.indices + int64_t{line} * width;
  SHARED(Tally, before);
  SHARED(Tally, all);
  SHARED(int[kSelectWarps], sums);
  if (thread == 0) before = all = Tally{};
  __syncthreads();
  for (int i = thread; i < s.chunks; i += kSelectThreads) {
    const Tally tally = s.tallies[int64_t{line} * s.chunks + i];
    atomicAdd(&all.above, tally.above);
    atomicAdd(&all.equal, tally.equal);
    if (i >= own) continue;
    atomicAdd(&before.above, tally.above);
    atomicAdd(&before.equal, tally.equal);
  }
  __syncthreads();
  const bool refused = state.refused;
  const int equals = state.equals, total = refused ? 0 : all.above + min(all.equal, equals);
  if (own == 0 && thread == 0) s.args.counts[line] = refused ? -1 : total;
  for (int i = total + own * kSelectThreads + thread; i < width; i += s.chunks * kSelectThreads) {
    indices[i] = -1;
  }

  const float* scores = scores_of(s, line);
  const int first = own * s.chunk, last = min(first + s.chunk, refused ? 0 : state.length);
  int above = before.above, equal = before.equal;
  for (int base = first; base < last; base += kSelectThreads) {
    const int i = base + thread;
    const int judged = i < last ? judge(state, i, scores[i]) : 0;
    int tile = 0;
    const int sum = sum_before(judged, sums, tile);
    const int equal_before = equal + (sum >> 16);
    if (judged == 1 || (judged > 1 && equal_before < equals)) {
      indices[above + (sum & 0xffff) + min(equal_before, equals)] = i;
    }
    above += tile & 0xffff;
    equal += tile >> 16;
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("adaptive::select_tokens: " + what);
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/// The cut into chunks and, given a workspace, the place of everything in it. Follows from sizes
/// and the device alone. Returns the bytes of workspace.
int64_t plan(Selection& s) {
  constexpr int64_t kSmallestChunk = 4096, kBlocksPerMultiprocessor = 2;
  const SelectTokensArgs& a = s.args;
  const int64_t lines = a.batch * a.kv_heads;
  if (lines == 0) return 0;
  const int64_t slots = kBlocksPerMultiprocessor * simt::current_device().multiprocessors;
  const int64_t useful = std::max<int64_t>(1, a.capacity / kSmallestChunk);
  s.chunks = static_cast<int>(std::clamp<int64_t>((slots + lines - 1) / lines, 1, useful));
  s.chunk = static_cast<int>(round_up((a.capacity + s.chunks - 1) / s.chunks, kSelectThreads));
  if (lines * s.chunks > INT32_MAX) refuse("batch must be smaller: too many thread blocks");

  int64_t bytes = 0;
  const auto place = [&](auto*& to, int64_t count) {
    to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(static_cast<char*>(a.workspace) +
                                                                 bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof *to), 16);
  };
  place(s.lines, lines);
  place(s.bins, lines * kBins);
  place(s.weights, a.mass < 1 ? lines * kBins : 0);
  place(s.tallies, lines * s.chunks);
  return bytes;
}

template <auto kKernel>
void launch(const Selection& s, bool each_chunk, Stream stream) {
  const int64_t blocks = s.args.batch * s.args.kv_heads * (each_chunk ? s.chunks : 1);
  simt::launch<kKernel>("select_tokens", dim3(static_cast<unsigned>(blocks)), dim3(kSelectThreads),
                        0, stream, s);
}

}  // namespace

int64_t select_tokens_workspace_bytes(const SelectTokensArgs& args) {
  Selection s{args};
  s.args.workspace = nullptr;
  return plan(s);
}

void select_tokens(const SelectTokensArgs& args, Stream stream) {
  if (args.batch == 0 || args.kv_heads == 0) return;
  Selection s{args};
  const int64_t wanted = plan(s);
  if (args.workspace_bytes < wanted) {
    refuse("workspace must have " + std::to_string(wanted) + " bytes, got " +
           std::to_string(args.workspace_bytes));
  }
  launch<prepare>(s, false, stream);
  if (args.mass < 1) {
    launch<measure>(s, true, stream);
    launch<descend<0, true>>(s, true, stream);
    launch<descend<1, true>>(s, true, stream);
    launch<descend<2, true>>(s, true, stream);
  } else {
    launch<descend<0, false>>(s, true, stream);
    launch<descend<1, false>>(s, true, stream);
    launch<descend<2, false>>(s, true, stream);
  }
  launch<count>(s, true, stream);
  launch<write>(s, true, stream);
}

}  // namespace adaptive::cuda
