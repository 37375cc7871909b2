// The histogram passes of select_tokens: each finds one more digit of the key that divides what is
// chosen from what is not.

#pragma once

#include "select_tokens.cuh"

namespace adaptive::cuda {
namespace {

constexpr int kBinsPerThread = kBins / kSelectThreads;

/// Of one thread's bins, highest first, the one in which `goal` is reached, given the sum of all
/// higher ones; below 0 if it is not here. Leaves in `goal` what that bin must still give.
template <class T>
__device__ __forceinline__ int find_bin(const T (&bins)[kBinsPerThread], T before, T& goal) {
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (before < goal && goal <= before + bins[i]) {
      goal -= before;
      return kBins - 1 - (static_cast<int>(threadIdx.x) * kBinsPerThread + i);
    }
    before += bins[i];
  }
  return -1;
}

/// Takes this thread's bins of a line, highest first, and leaves zeros. Returns their sum.
template <class T>
__device__ __forceinline__ T take_bins(volatile T* from, T (&bins)[kBinsPerThread]) {
  T sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    volatile T& bin = from[kBins - 1 - (static_cast<int>(threadIdx.x) * kBinsPerThread + i)];
    sum += bins[i] = bin;
    bin = 0;
  }
  return sum;
}

template <int kPass>
constexpr int kBitsOf = kPass < 2 ? kDigitBits : 32 - 2 * kDigitBits;
template <int kPass>
constexpr int kShiftOf = kPass < 2 ? 32 - (kPass + 1) * kDigitBits : 0;

/// What the last block of a line does with its histograms: the next digits, or the result.
template <int kPass, bool kShares>
__device__ __forceinline__ void choose_digits(const Selection& s, int line, Line& state) {
  constexpr int kBits = kBitsOf<kPass>;
  SHARED(uint32_t[kSelectWarps], sums);
  SHARED(Weight[kSelectWarps], weight_sums);
  const uint32_t by_number = state.by_number, by_weight = state.by_weight;
  uint32_t goal = state.number_rest;
  Weight weight_goal = state.weight_rest;

  uint32_t bins[kBinsPerThread], total;
  const uint32_t own = take_bins<uint32_t>(s.bins + int64_t{line} * kBins, bins);
  const uint32_t before = sum_before(own, sums, total);
  if (kPass == 0) goal = min(static_cast<uint32_t>(s.args.budget) - state.forced, total);
  if constexpr (kShares) {
    Weight weights[kBinsPerThread], weight_total;
    const Weight own_weight = take_bins<Weight>(s.weights + int64_t{line} * kBins, weights);
    const Weight weight_before = sum_before(own_weight, weight_sums, weight_total);
    if (kPass == 0) {
      const Weight forced = *const_cast<volatile Weight*>(&state.forced_weight);
      const double share = __dmul_rn(s.args.mass, static_cast<double>(weight_total + forced));
      const double need = share - static_cast<double>(forced);
      weight_goal = need > 0 ? static_cast<Weight>(ceil(need)) : 0;
      if (weight_goal == 0) goal = 0;
    }
    const int bin = find_bin(weights, weight_before, weight_goal);
    if (bin >= 0) {
      state.by_weight = by_weight << kBits | static_cast<uint32_t>(bin);
      state.weight_rest = weight_goal;
    }
  }
  const int bin = find_bin(bins, before, goal);
  if (bin >= 0) {
    state.by_number = by_number << kBits | static_cast<uint32_t>(bin);
    state.number_rest = goal;
  }
  if (kPass < kPasses - 1) return;

  __syncthreads();
  if (threadIdx.x != 0) return;
  uint32_t key = state.number_rest > 0 ? state.by_number : ~0u;
  Weight equals = state.number_rest;
  if (kShares && equals > 0) {
    const Weight each = weight_of(score_of(state.by_weight), state.largest);
    const Weight enough = (state.weight_rest + each - 1) / each;
    if (state.by_weight > key || (state.by_weight == key && enough < equals)) {
      key = state.by_weight;
      equals = enough;
    }
  }
  state.key = key;
  state.equals = static_cast<int>(equals);
}

/// Adds the next digit of all keys that begin with the digits found so far to a histogram.
template <int kPass, bool kShares>
__global__ void __launch_bounds__(kSelectThreads) descend(const __grid_constant__ Selection s) {
  constexpr int kShift = kShiftOf<kPass>, kPrefixShift = kShift + kBitsOf<kPass>;
  constexpr uint32_t kDigit = (1u << kBitsOf<kPass>)-1;
  const int line = blockIdx.x / s.chunks, thread = threadIdx.x;
  Line& state = s.lines[line];
  // What pass 0 refuses it finds itself; blocks that see it early leave, and no one will ask.
  if ((kShares || kPass > 0) && state.refused) return;
  const uint32_t by_number = state.by_number, by_weight = state.by_weight;
  const uint32_t largest = state.largest;
  const int begin = state.begin, end = state.end;

  SHARED(uint32_t[kBins], bins);
  SHARED(Weight[kShares ? kBins : 1], weights);
  SHARED(Weight, forced_weight);
  SHARED(bool, last);
  for (int i = thread; i < kBins; i += kSelectThreads) {
    bins[i] = 0;
    if (kShares) weights[i] = 0;
  }
  if (thread == 0) forced_weight = 0;
  __syncthreads();

  bool bad = false;
  visit_chunk(s, line, state.length, [&](int position, float score) {
    if (kPass == 0 && score != score) {
      bad = true;
      return;
    }
    const bool forced = position < begin || position >= end;
    if (forced && (kPass > 0 || !kShares)) return;
    const uint32_t key = key_of(score), digit = key >> kShift & kDigit;
    if (forced) {
      atomicAdd(&forced_weight, weight_of(score, largest));
      return;
    }
    if (kPass == 0 || key >> (kPrefixShift & 31) == by_number) atomicAdd(&bins[digit], 1u);
    if (kShares && (kPass == 0 || key >> (kPrefixShift & 31) == by_weight)) {
      atomicAdd(&weights[digit], weight_of(score, largest));
    }
  });
  if (bad) atomicMax(&state.refused, 1u);
  __syncthreads();

  for (int i = thread; i < kBins; i += kSelectThreads) {
    if (bins[i] > 0) atomicAdd(s.bins + int64_t{line} * kBins + i, bins[i]);
    if (kShares && weights[i] > 0) atomicAdd(s.weights + int64_t{line} * kBins + i, weights[i]);
  }
  if (thread == 0 && forced_weight > 0) atomicAdd(&state.forced_weight, forced_weight);
  __threadfence();
  __syncthreads();
  if (thread == 0) {
    last = atomicAdd(&state.arrived[kPass], 1u) == static_cast<uint32_t>(s.chunks - 1);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  choose_digits<kPass, kShares>(s, line, state);
}

}  // namespace
}  // namespace adaptive::cuda
