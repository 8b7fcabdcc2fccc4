// Rows of any length: a CTA or a cluster of a row, one pass over memory.
//
// Every CTA streams its slice of the columns past a guessed threshold (stream.cuh); the cluster's
// CTAs each select among all candidates, and write the indices of their own. Where a guess turns
// out to be useless, which sampling makes rare, the threshold is counted out over the whole row.
// Nothing depends on the order in which threads or CTAs run: the result is the same at every run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/topk_key.h"
#include "cuda/common/cluster.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/topk/select.cuh"
#include "cuda/topk/stream.cuh"
#include "cuda/topk/write.cuh"
#include "params/topk.h"

namespace fastattn::cuda {

// Shared memory of a CTA, in words behind its scratch: bits and columns of the candidates, the
// keys of all the cluster's, and two bitmaps of the window.
struct TopkPlan {
  int cluster = 1;
  int capacity = 0;  // candidates
  int window = 0;    // words of a bitmap, of at most twice as many as candidates

  FASTATTN_HD constexpr int64_t Bytes() const {
    const int64_t words = int64_t{capacity} * (cluster > 1 ? 3 : 2) + 2 * int64_t{window};
    return static_cast<int64_t>(sizeof(TopkScratch)) + 4 * words;
  }
};

// Candidates that there is room for: some more than SampleRank asks for.
inline constexpr int LeastCapacity(int64_t k) {
  return static_cast<int>(2 * k + 2048 < 4096 ? 4096 : 2 * k + 2048);
}

struct TopkShared {
  TopkScratch* scratch;
  TopkCandidates candidates;
  uint32_t* keys;
  TopkBitmaps maps;

  __device__ __forceinline__ TopkShared(char* dynamic, const TopkPlan& plan) {
    scratch = reinterpret_cast<TopkScratch*>(dynamic);
    auto* words = reinterpret_cast<uint32_t*>(dynamic + sizeof(TopkScratch));
    maps.larger = words;
    maps.equal = words + plan.window;
    words += 2 * plan.window;
    maps.places = candidates.bits = words;
    candidates.columns = reinterpret_cast<int32_t*>(words + plan.capacity);
    candidates.capacity = plan.capacity;
    keys = plan.cluster > 1 ? words + 2 * plan.capacity : words;
  }
};

// A row's part in a CTA.
struct TopkTask {
  TopkSlice row, slice;
  int origin;  // of the range, in `row`
  int rank;    // of the CTA
  uint32_t k;
  int32_t* out;
};

// Numbers of a kind, over the cluster: of the CTAs before this one, and of all.
struct ClusterSum {
  uint32_t before, all;
};

// Both of scratch->offers over the cluster, in every thread; behind the cluster's barrier. Returns
// those of the CTA whose rank is the lane's.
__device__ __forceinline__ uint2 SumOffers(const TopkScratch* scratch, const TopkPlan& plan,
                                           int rank, ClusterSum* above, ClusterSum* equal) {
  const int lane = threadIdx.x % 32;
  uint2 offers = make_uint2(0, 0);
  if (plan.cluster == 1) {
    *above = {0, scratch->offers[0]};
    *equal = {0, scratch->offers[1]};
    return offers;
  }
  if (lane < plan.cluster) offers = LoadClusterPair(lane, scratch->offers);
  above->before = __reduce_add_sync(kFullWarp, lane < rank ? offers.x : 0);
  above->all = __reduce_add_sync(kFullWarp, offers.x);
  equal->before = __reduce_add_sync(kFullWarp, lane < rank ? offers.y : 0);
  equal->all = __reduce_add_sync(kFullWarp, offers.y);
  return offers;
}

template <int kThreads>
__device__ __forceinline__ void ClusterBarrier(int cluster) {
  if (cluster == 1) {
    __syncthreads();
  } else {
    ArriveAtCluster();
    WaitForCluster();
  }
}

template <int kThreads>
__device__ __forceinline__ void ClearBitmap(uint32_t* bits, int words) {
  for (int w = threadIdx.x; w < words; w += kThreads) bits[w] = 0;
}

// The threshold counted out over the whole row, and the chosen columns written, a window of the
// slice at a time. For guesses that failed and slices that no bitmap holds.
template <int kThreads>
__device__ __noinline__ void SelectExactly(const TopkTask task, const TopkPlan plan,
                                           const TopkShared shared) {
  TopkScratch* scratch = shared.scratch;
  const TopkSlice& slice = task.slice;
  const int lane = threadIdx.x % 32;
  const auto inside = [&](int at) { return at >= slice.begin && at < slice.end; };
  TopkStream<kThreads> stream;
  uint32_t wanted = task.k;
  const TopkInterval interval = Select<kThreads>(
      {}, &wanted, 0, scratch,
      [&](const auto& count) {
        stream.Load(slice, slice.First());
        stream.Run(slice, [&](const uint4* four, int column) {
#pragma unroll
          for (int j = 0; j < kStreamVectors; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              count(TopkKey(__float_as_uint(LaneOf(four[j], i))),
                    inside(slice.First() + column + 128 * j + i));
            }
          }
        });
      },
      plan.cluster);
  uint2 before = make_uint2(0, 0);
  if (plan.cluster > 1) {  // what the CTAs before this one choose
    uint32_t larger = 0, equal = 0;
    stream.Load(slice, slice.First());
    stream.Run(slice, [&](const uint4* four, int column) {
#pragma unroll
      for (int j = 0; j < kStreamVectors; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t key = TopkKey(__float_as_uint(LaneOf(four[j], i)));
          const bool there = inside(slice.First() + column + 128 * j + i);
          larger += there && interval.IsBelow(key);
          equal += there && interval.Has(key);
        }
      }
    });
    ClusterBarrier<kThreads>(plan.cluster);  // offers have been read
    if (threadIdx.x == 0) scratch->offers[0] = scratch->offers[1] = 0;
    __syncthreads();
    larger = __reduce_add_sync(kFullWarp, larger);
    equal = __reduce_add_sync(kFullWarp, equal);
    if (lane == 0) {
      atomicAdd(&scratch->offers[0], larger);
      atomicAdd(&scratch->offers[1], equal);
    }
    ClusterBarrier<kThreads>(plan.cluster);
    ClusterSum all_larger, all_equal;
    SumOffers(scratch, plan, task.rank, &all_larger, &all_equal);
    before = make_uint2(all_larger.before, all_equal.before);
    ClusterBarrier<kThreads>(plan.cluster);  // no CTA ends while others read its numbers
  }
  const int columns = 32 * plan.window;
#pragma unroll 1
  for (int first = slice.First(); first < slice.end; first += columns) {
    TopkSlice part = slice;
    part.begin = max(slice.begin, first);
    part.end = min(slice.end, first + columns);
    TopkBitmaps maps = shared.maps;
    maps.words = (part.end - first + 31) / 32;
    stream.Load(part, first);
    stream.Run(part, [&](const uint4* four, int column) {
#pragma unroll
      for (int j = 0; j < kStreamVectors; ++j) {
        uint32_t larger = 0, equal = 0;
        const int at = first + column + 128 * j;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t key = TopkKey(__float_as_uint(LaneOf(four[j], i)));
          const bool there = at + i >= part.begin && at + i < part.end;
          larger |= there && interval.IsBelow(key) ? 1u << i : 0;
          equal |= there && interval.Has(key) ? 1u << i : 0;
        }
        larger = WordOf(larger), equal = WordOf(equal);
        if (lane % 8 == 0 && at < part.end) {
          maps.larger[(at - first) / 32] = larger;
          maps.equal[(at - first) / 32] = equal;
        }
      }
    });
    __syncthreads();
    before = WriteWindow<kThreads>(maps, first - task.origin, before, wanted, task.out, scratch);
    __syncthreads();  // the bitmaps are read
  }
}

// All candidates' keys in every CTA; scratch->greatest is the greatest. `counts`: of the CTA whose
// rank is the lane's.
template <int kThreads>
__device__ __forceinline__ void GatherKeys(const TopkShared& shared, const TopkPlan& plan,
                                           uint32_t counts, uint32_t all) {
  uint32_t greatest = 0;
  if (plan.cluster == 1) {
    for (uint32_t i = threadIdx.x; i < all; i += kThreads) {
      shared.keys[i] = TopkKey(shared.candidates.bits[i]);
      greatest = max(greatest, shared.keys[i]);
    }
  } else {  // some warps for each CTA, so that nobody waits for one after the other
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int rank = warp % plan.cluster, team = kThreads / plan.cluster;
    const uint32_t first = __reduce_add_sync(kFullWarp, lane < rank ? counts : 0);
    const uint32_t count = __shfl_sync(kFullWarp, counts, rank);
#pragma unroll 4
    for (uint32_t i = warp / plan.cluster * 32 + lane; i < count; i += team) {
      const uint32_t key = TopkKey(LoadClusterWord(rank, shared.candidates.bits + i));
      shared.keys[first + i] = key;
      greatest = max(greatest, key);
    }
  }
  greatest = __reduce_max_sync(kFullWarp, greatest);
  if (threadIdx.x % 32 == 0) atomicMax(&shared.scratch->greatest, greatest);
}

// Bits of this CTA's candidates, larger or equal; scratch->before counts those of CTAs before it.
template <int kThreads>
__device__ __forceinline__ void MarkCandidates(const TopkShared& shared,
                                               const TopkInterval& interval,
                                               const ClusterSum& above) {
  const uint32_t own = shared.scratch->offers[0];
  uint32_t larger = 0, equal = 0;
  for (uint32_t i = threadIdx.x; i < above.before + own; i += kThreads) {
    const uint32_t key = shared.keys[i];
    const bool is_larger = interval.IsBelow(key), is_equal = interval.Has(key);
    if (i < above.before) {
      larger += is_larger;
      equal += is_equal;
    } else if (is_larger || is_equal) {
      const int column = shared.candidates.columns[i - above.before];
      atomicOr((is_larger ? shared.maps.larger : shared.maps.equal) + column / 32,
               1u << column % 32);
    }
  }
  if (above.before == 0) return;
  larger = __reduce_add_sync(kFullWarp, larger);
  equal = __reduce_add_sync(kFullWarp, equal);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&shared.scratch->before[0], larger);
    atomicAdd(&shared.scratch->before[1], equal);
  }
}

// The row's part of this CTA, where the row has more than k columns.
template <int kThreads>
__device__ __forceinline__ void SelectOfRow(const TopkTask& task, const TopkPlan& plan,
                                            const TopkShared& shared) {
  TopkScratch* scratch = shared.scratch;
  TopkBitmaps maps = shared.maps;
  maps.words = (task.slice.end - task.slice.First() + 31) / 32;
  TopkStream<kThreads> stream;
  stream.Load(task.slice, task.slice.First());
  ClearCounts<kThreads>(scratch);
  ClearBitmap<kThreads>(maps.larger, 2 * plan.window);
  if (threadIdx.x == 0) {
    scratch->offers[0] = scratch->offers[1] = 0;
    scratch->before[0] = scratch->before[1] = 0;
    scratch->greatest = 0;
  }
  __syncthreads();
  const float guess = GuessThreshold<kThreads>(
      task.row, SampleRank(task.k, task.row.end - task.row.begin), scratch);
  Collect<kThreads>(task.slice, guess, &stream, shared.candidates, maps.equal, scratch);
  ClusterBarrier<kThreads>(plan.cluster);
  ClusterSum above, equal;
  const uint2 offers = SumOffers(scratch, plan, task.rank, &above, &equal);
  if (above.all > shared.candidates.capacity || above.all + equal.all < task.k) {
    ClusterBarrier<kThreads>(plan.cluster);  // the offers are read
    SelectExactly<kThreads>(task, plan, shared);
    return;
  }
  uint2 before;
  uint32_t wanted;
  if (above.all < task.k) {  // all candidates, and the first of the columns equal to the guess
    if (plan.cluster > 1) ArriveAtCluster();
    const uint32_t own = scratch->offers[0];
    for (uint32_t i = threadIdx.x; i < own; i += kThreads) {
      const int column = shared.candidates.columns[i];
      atomicOr(maps.larger + column / 32, 1u << column % 32);
    }
    wanted = task.k - above.all;
    before = make_uint2(above.before, equal.before);
    __syncthreads();
  } else {
    GatherKeys<kThreads>(shared, plan, offers.x, above.all);
    if (plan.cluster > 1) ArriveAtCluster();
    if (scratch->offers[1] != 0) ClearBitmap<kThreads>(maps.equal, maps.words);
    __syncthreads();
    wanted = task.k;
    const uint32_t low = TopkKey(__float_as_uint(guess));
    const TopkInterval all{low, 32 - __clz(static_cast<int>(scratch->greatest - low))};
    const TopkInterval interval =
        Select<kThreads>(all, &wanted, 0, scratch, [&](const auto& count) {
#pragma unroll 2
          for (uint32_t i = threadIdx.x; i - threadIdx.x % 32 < above.all; i += kThreads) {
            const bool there = i < above.all;
            count(there ? shared.keys[i] : 0, there);
          }
        });
    MarkCandidates<kThreads>(shared, interval, above);
    __syncthreads();
    before = make_uint2(scratch->before[0], scratch->before[1]);
  }
  if (plan.cluster > 1) WaitForCluster();  // nobody reads this CTA's candidates any more
  WriteWindow<kThreads>(maps, task.slice.First() - task.origin, before, wanted, task.out, scratch);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    LongTopkKernel(const TopkParams p, const TopkPlan plan) {
  extern __shared__ __align__(16) char dynamic[];
  PdlWait();
  PdlLaunchDependents();
  const int64_t row = blockIdx.x / plan.cluster;
  const TopkRange range =
      TopkRangeOf(p.starts == nullptr ? 0 : p.starts[row], p.lengths[row], p.columns);
  TopkTask task;
  task.rank = blockIdx.x % plan.cluster;
  task.k = static_cast<uint32_t>(p.k);
  task.out = p.indices + row * p.k;
  if (range.size <= p.k) {  // for the whole cluster
    const int step = kThreads * plan.cluster;
    for (int64_t i = task.rank * kThreads + threadIdx.x; i < p.k; i += step) {
      task.out[i] = i < range.size ? static_cast<int32_t>(i) : -1;
    }
    return;
  }
  // Columns from a 16-byte boundary on, at most 3 before the range.
  const float* first = p.logits + row * p.row_stride + range.begin;
  task.origin = static_cast<int>(reinterpret_cast<uintptr_t>(first) / 4 % 4);
  const int end = task.origin + static_cast<int>(range.size);
  task.row = {first - task.origin, task.origin, end};
  const int share = ((end + plan.cluster - 1) / plan.cluster + 31) / 32 * 32;
  task.slice = task.row;
  task.slice.end =
      static_cast<int>(min(static_cast<int64_t>(task.rank + 1) * share, static_cast<int64_t>(end)));
  task.slice.begin = static_cast<int>(
      min(max(static_cast<int64_t>(task.rank) * share, static_cast<int64_t>(task.origin)),
          static_cast<int64_t>(task.slice.end)));
  const TopkShared shared(dynamic, plan);
  if (share <= 32 * plan.window) {  // alike in all CTAs
    SelectOfRow<kThreads>(task, plan, shared);
  } else {
    ClearCounts<kThreads>(shared.scratch);
    __syncthreads();
    SelectExactly<kThreads>(task, plan, shared);
  }
}

}  // namespace fastattn::cuda
