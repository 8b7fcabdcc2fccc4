// The k-th largest of many keys (common/topk_key.h): a radix selection by counts in shared memory.
//
// An interval of keys is narrowed by up to 11 bits a pass: its keys are counted by the next bits,
// and the bin in which the wanted one lies is the next interval. Counts are sums of integers, so
// that the order of atomic additions does not matter. Most selections end after one or two passes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/cluster.cuh"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

inline constexpr int kTopkBins = 2048;
inline constexpr int kTopkDigit = 11;  // bits
inline constexpr int kTopkFew = 128;

struct alignas(16) TopkScratch {
  uint32_t counts[kTopkBins];  // zero between selections
  uint32_t warp_sums[4][32];
  uint32_t digit, above, equal;   // what a pass found
  uint32_t greatest, least;       // keys of the candidates
  alignas(8) uint32_t offers[2];  // columns of this CTA's slice above the guess, and equal to it
  alignas(8) uint32_t before[2];  // chosen by the CTAs before this one: larger, and equal
  uint32_t window[2];             // the same, in the windows so far
  uint32_t number;                // of `few`
  float few[kTopkFew];            // values that are ranked in pairs
};

// Keys low .. low + 2^bits - 1. None of the keys that are asked about wraps around the end.
struct TopkInterval {
  uint32_t low = 0;
  int bits = 32;

  __device__ __forceinline__ bool Has(uint32_t key) const {
    return bits == 32 || (key - low) >> bits == 0;
  }
  __device__ __forceinline__ bool IsBelow(uint32_t key) const { return key >= low && !Has(key); }
};

template <int kThreads>
__device__ __forceinline__ void ClearCounts(TopkScratch* scratch) {
#pragma unroll
  for (int i = 0; i < kTopkBins; i += kThreads) scratch->counts[i + threadIdx.x] = 0;
}

// Sum of `x` over the threads before this one. The first kThreads of the CTA call it, `barrier`
// being theirs; they do so again only behind another barrier.
template <int kThreads, typename Barrier>
__device__ __forceinline__ uint32_t SumBefore(uint32_t x, uint32_t* warp_sums,
                                              const Barrier& barrier) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  barrier();
  const uint32_t earlier = lane < warp ? warp_sums[lane] : 0;
  return __reduce_add_sync(kFullWarp, earlier) + sum - x;
}

template <int kThreads>
__device__ __forceinline__ uint32_t SumBefore(uint32_t x, uint32_t* warp_sums) {
  return SumBefore<kThreads>(x, warp_sums, [] { __syncthreads(); });
}

// Finds, from the top, the bin in which the `wanted`-th key lies, and clears the counts. `counts`
// has been added to behind a barrier; over a cluster, the sum of all CTAs' counts is taken.
template <int kThreads>
__device__ __forceinline__ void FindDigit(TopkScratch* scratch, uint32_t wanted, int cluster) {
  constexpr int kOwn = kTopkBins / kThreads;
  static_assert(kOwn >= 1 && kOwn % 2 == 0, "pairs of bins");
  const int low = kTopkBins - (static_cast<int>(threadIdx.x) + 1) * kOwn;
  uint32_t own[kOwn];
  if (cluster == 1) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; i += 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(scratch->counts + low + i);
      own[i] = two.x, own[i + 1] = two.y;
    }
  } else {
    ArriveAtCluster();
    WaitForCluster();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i] = 0;
    for (int rank = 0; rank < cluster; ++rank) {
#pragma unroll
      for (int i = 0; i < kOwn; i += 2) {
        const uint2 two = LoadClusterPair(rank, scratch->counts + low + i);
        own[i] += two.x, own[i + 1] += two.y;
      }
    }
    ArriveAtCluster();
    WaitForCluster();
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; i += 2) {
    *reinterpret_cast<uint2*>(scratch->counts + low + i) = make_uint2(0, 0);
    sum += own[i] + own[i + 1];
  }
  uint32_t above = SumBefore<kThreads>(sum, scratch->warp_sums[0]);
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    if (above < wanted && wanted <= above + own[i]) {
      scratch->digit = low + i;
      scratch->above = above;
      scratch->equal = own[i];
    }
    above += own[i];
  }
  __syncthreads();
}

// One pass: narrows the interval, which has been counted by the bits above `shift`.
template <int kThreads>
__device__ __forceinline__ TopkInterval Narrow(const TopkInterval& interval, int shift,
                                               uint32_t* wanted, TopkScratch* scratch,
                                               int cluster = 1) {
  FindDigit<kThreads>(scratch, *wanted, cluster);
  *wanted -= scratch->above;
  return {interval.low + (scratch->digit << shift), shift};
}

__device__ __forceinline__ int NextShift(const TopkInterval& interval) {
  return interval.bits > kTopkDigit ? interval.bits - kTopkDigit : 0;
}

// The interval in which the `wanted`-th largest key lies, and in `wanted` the number of its keys
// among the k largest: all of them, or its keys are equal. `slack`: so many too many are no reason
// for another pass. `visit(count)` calls count(key, valid) for every key.
template <int kThreads, typename Visit>
__device__ __forceinline__ TopkInterval Select(TopkInterval interval, uint32_t* wanted,
                                               uint32_t slack, TopkScratch* scratch,
                                               const Visit& visit, int cluster = 1) {
#pragma unroll 1
  while (true) {
    const int shift = NextShift(interval);
    visit([&](uint32_t key, bool valid) {
      // Without a result, equal bins of a warp cost the hardware no more than one.
      if (valid && interval.Has(key))
        atomicAdd(scratch->counts + ((key - interval.low) >> shift), 1u);
    });
    interval = Narrow<kThreads>(interval, shift, wanted, scratch, cluster);
    if (shift == 0 || scratch->equal <= *wanted + slack) return interval;
  }
}

}  // namespace fastattn::cuda
