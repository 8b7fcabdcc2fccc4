// Which of a CTA's (or a cluster's) candidates are among the k largest: a radix selection.
//
// Candidates lie in shared memory as keys (common/topk_key.h), in the order of their columns.
// Each pass counts the keys of one digit, of those that agree with the digits found so far, and
// finds the digit of the k-th largest. It ends early where all keys with the digits found are
// chosen. Counts are sums of integers, so that the order of atomic additions does not matter.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/cluster.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/shared_address.cuh"

namespace fastattn::cuda {

inline constexpr int kTopkThreads = 512;
inline constexpr int kTopkWarps = kTopkThreads / 32;
inline constexpr int kTopkBins = 2048;
inline constexpr int kBinsPerThread = kTopkBins / kTopkThreads;

// Shared memory that a selection needs beside the candidates.
struct TopkScratch {
  uint32_t counts[kTopkBins];  // of this CTA
  uint32_t totals[kTopkBins];  // of the cluster
  uint32_t warp_sums[2][kTopkWarps];
  uint32_t digit, above, equal;   // what a pass found
  alignas(8) uint32_t chosen[2];  // of this CTA: larger, and equal in the digits found
};

// Candidates [begin, end) of a CTA.
struct TopkCandidates {
  const uint32_t* keys;
  int begin, end;
};

// Chosen are the keys whose leading digits, key >> shift, exceed `prefix`, and the first `equal`
// of those that have it.
struct TopkThreshold {
  int shift = 32;
  uint32_t prefix = 0;
  uint32_t equal = 0;

  __device__ __forceinline__ bool Larger(uint32_t key) const {
    return shift < 32 && (key >> shift) > prefix;
  }
  __device__ __forceinline__ bool Equal(uint32_t key) const {
    return shift >= 32 || (key >> shift) == prefix;
  }
};

// Adds one for each lane with `valid` to its bin. Lanes that agree with the first of them are
// counted at once: equal values, such as the zeros of a ReLU, would queue up.
__device__ __forceinline__ void CountKey(uint32_t* counts, uint32_t bin, bool valid) {
  const uint32_t lanes = __ballot_sync(kFullWarp, valid);
  if (lanes == 0) return;
  const int first = __ffs(lanes) - 1;
  const uint32_t common = __shfl_sync(kFullWarp, bin, first);
  const uint32_t alike = __ballot_sync(kFullWarp, valid && bin == common);
  if (static_cast<int>(threadIdx.x % 32) == first) atomicAdd(counts + common, __popc(alike));
  if (valid && bin != common) atomicAdd(counts + bin, 1u);
}

__device__ __forceinline__ void ClearCounts(TopkScratch* scratch) {
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) scratch->counts[threadIdx.x + i * kTopkThreads] = 0;
  __syncthreads();
}

// The sums of all CTAs' counts, in every CTA: each adds up a share of the bins for all.
__device__ __forceinline__ const uint32_t* ClusterTotals(TopkScratch* scratch, int cluster) {
  if (cluster == 1) {
    __syncthreads();
    return scratch->counts;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  ArriveAtCluster();
  WaitForCluster();
  const int share = kTopkBins / cluster, first = ClusterRank() * share;
  for (int bin = first + threadIdx.x; bin < first + share; bin += kTopkThreads) {
    const uint32_t address = SharedAddress(scratch->counts + bin);
    uint32_t sum = 0;
    for (int rank = 0; rank < cluster; ++rank) {
      uint32_t count;
      asm volatile("ld.shared::cluster.u32 %0, [%1];"
                   : "=r"(count)
                   : "r"(AddressInCluster(rank, address))
                   : "memory");
      sum += count;
    }
    const uint32_t total = SharedAddress(scratch->totals + bin);
    for (int rank = 0; rank < cluster; ++rank) {
      asm volatile("st.shared::cluster.u32 [%0], %1;"
                   :
                   : "r"(AddressInCluster(rank, total)), "r"(sum)
                   : "memory");
    }
  }
  ArriveAtCluster();
  WaitForCluster();
#endif
  return scratch->totals;
}

// Sum of `x` over the threads before this one; every thread passes a buffer of its own use.
__device__ __forceinline__ uint32_t SumBefore(uint32_t x, uint32_t* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = x;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
#pragma unroll
  for (int w = 0; w < kTopkWarps; ++w) before += w < warp ? warp_sums[w] : 0;
  return before + sum - x;
}

// Finds, from the top, the bin in which the `wanted`-th key lies.
__device__ __forceinline__ void FindDigit(const uint32_t* totals, uint32_t wanted,
                                          TopkScratch* scratch) {
  const int top = kTopkBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
  uint32_t counts[kBinsPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += counts[i] = totals[top - i];
  uint32_t above = SumBefore(sum, scratch->warp_sums[0]);
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (above < wanted && wanted <= above + counts[i]) {
      scratch->digit = top - i;
      scratch->above = above;
      scratch->equal = counts[i];
    }
    above += counts[i];
  }
  __syncthreads();
}

// Threshold of the k largest of the cluster's candidates, of which there are more than k. The
// first digit has been counted where `counted`, else `scratch` is free.
__device__ __forceinline__ TopkThreshold FindThreshold(const TopkCandidates& candidates, uint32_t k,
                                                       bool counted, int cluster,
                                                       TopkScratch* scratch) {
  TopkThreshold found;
  uint32_t wanted = k;
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    if (pass > 0 || !counted) {
      ClearCounts(scratch);
      const int size = candidates.end - candidates.begin;
#pragma unroll 4
      for (int i = threadIdx.x; i - static_cast<int>(threadIdx.x % 32) < size; i += kTopkThreads) {
        const bool there = i < size;
        const uint32_t key = there ? candidates.keys[candidates.begin + i] : 0;
        CountKey(scratch->counts, (key >> shift) & (pass == 2 ? 1023u : 2047u),
                 there && found.Equal(key));
      }
    }
    const uint32_t* totals = ClusterTotals(scratch, cluster);
    FindDigit(totals, wanted, scratch);
    found.prefix = found.prefix << (pass == 2 ? 10 : 11) | scratch->digit;
    found.shift = shift;
    wanted -= scratch->above;
    const uint32_t equal = scratch->equal;
    __syncthreads();  // before the next pass writes what was read
    if (equal == wanted) break;
  }
  found.equal = wanted;
  return found;
}

}  // namespace fastattn::cuda
