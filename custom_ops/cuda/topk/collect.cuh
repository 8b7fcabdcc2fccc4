// The candidates of a CTA: what of its columns may still be among the row's k largest.
//
// Resident: the keys of all its columns, where they fit shared memory. Streaming: the columns pass
// by in chunks, and those above the k-th largest so far are appended, with their indices. A full
// buffer is cut to its k largest. Candidates stay in the order of their columns, and a column that
// equals the k-th largest of k earlier ones has lost: ties go to the first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/topk_key.h"
#include "cuda/topk/select.cuh"
#include "params/topk.h"

namespace fastattn::cuda {

// Columns that a warp takes at a time, in vectors of 4 a lane, and a CTA.
inline constexpr int kTopkVectors = 4;
inline constexpr int kWarpChunk = kTopkVectors * 128;
inline constexpr int kTopkChunk = kTopkWarps * kWarpChunk;
// Candidates of a streaming CTA: the k largest and a chunk. A resident one keeps no indices, and
// so has room for twice as many.
inline constexpr int kTopkCandidates = kTopkMaxK + kTopkChunk;
inline constexpr int kTopkWords = 2 * kTopkCandidates;

// Columns [begin, end) of a row, counted from a 16-byte boundary at or before the row's range.
struct TopkSlice {
  const float* base;
  int begin, end;
};

// Keys of the 4 columns from `at` on, and which of them lie in the slice.
__device__ __forceinline__ uint4 LoadKeys(const TopkSlice& slice, int at, uint32_t* there) {
  uint32_t bits[4] = {0, 0, 0, 0};
  *there = 0;
  if (at >= slice.begin && at + 4 <= slice.end) {
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(slice.base + at));
    bits[0] = loaded.x, bits[1] = loaded.y, bits[2] = loaded.z, bits[3] = loaded.w;
    *there = 15;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i >= slice.begin && at + i < slice.end) {
        bits[i] = __float_as_uint(__ldg(slice.base + at + i));
        *there |= 1u << i;
      }
    }
  }
  return make_uint4(TopkKey(bits[0]), TopkKey(bits[1]), TopkKey(bits[2]), TopkKey(bits[3]));
}

// All keys of a slice of at most kTopkWords - 3 columns, their first digits counted on the way.
__device__ __forceinline__ TopkCandidates CollectAll(const TopkSlice& slice, uint32_t* keys,
                                                     TopkScratch* scratch) {
  const int first = slice.begin & ~3, size = slice.end - first;
#pragma unroll 1
  for (int chunk = 0; chunk < size; chunk += kTopkChunk) {
    uint4 four[kTopkVectors];
    uint32_t there[kTopkVectors];
#pragma unroll
    for (int j = 0; j < kTopkVectors; ++j) {
      const int at = chunk + 4 * (j * kTopkThreads + static_cast<int>(threadIdx.x));
      four[j] = LoadKeys(slice, first + at, &there[j]);
      if (at < size) *reinterpret_cast<uint4*>(keys + at) = four[j];
    }
#pragma unroll
    for (int j = 0; j < kTopkVectors; ++j) {
      CountKey(scratch->counts, four[j].x >> 21, (there[j] & 1) != 0);
      CountKey(scratch->counts, four[j].y >> 21, (there[j] & 2) != 0);
      CountKey(scratch->counts, four[j].z >> 21, (there[j] & 4) != 0);
      CountKey(scratch->counts, four[j].w >> 21, (there[j] & 8) != 0);
    }
  }
  return {keys, slice.begin < slice.end ? slice.begin - first : size, size};
}

// What a warp appends, in the order of columns: of the lanes before this one, and of all.
struct WarpOrder {
  uint32_t before, all;
};

__device__ __forceinline__ WarpOrder OrderInWarp(uint32_t mask) {
  const uint32_t lower = (1u << threadIdx.x % 32) - 1;
  WarpOrder order{0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t lanes = __ballot_sync(kFullWarp, (mask >> i & 1) != 0);
    order.before += __popc(lanes & lower);
    order.all += __popc(lanes);
  }
  return order;
}

// Cuts the buffer to its k largest, in place; returns the threshold's key.
__device__ __forceinline__ uint32_t Cut(uint32_t* keys, int32_t* columns, int count, uint32_t k,
                                        TopkScratch* scratch) {
  const TopkThreshold threshold =
      FindThreshold(TopkCandidates{keys, 0, count}, k, false, 1, scratch);
  constexpr int kPerThread = 4;
  constexpr int kRound = kPerThread * kTopkThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t lower = (1u << lane) - 1;
  uint32_t kept = 0, equal_before = 0, least = 0xFFFFFFFFu;
#pragma unroll 1
  for (int round = 0; round < count; round += kRound) {
    uint32_t key[kPerThread], larger[kPerThread], equal[kPerThread];
    int32_t column[kPerThread];
    uint32_t sums = 0;  // of the warp: larger ones, and equal ones in the upper half
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = round + warp * 32 * kPerThread + i * 32 + lane;
      const bool there = at < count;
      key[i] = there ? keys[at] : 0;
      column[i] = there ? columns[at] : 0;
      larger[i] = __ballot_sync(kFullWarp, there && threshold.Larger(key[i]));
      equal[i] = __ballot_sync(kFullWarp, there && threshold.Equal(key[i]));
      sums += __popc(larger[i]) + (__popc(equal[i]) << 16);
    }
    if (lane == 0) scratch->warp_sums[0][warp] = sums;
    __syncthreads();  // all keys of the round are read, too
    uint32_t before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < kTopkWarps; ++w) {
      const uint32_t x = scratch->warp_sums[0][w];
      before += w < warp ? x : 0;
      total += x;
    }
    uint32_t larger_so_far = before & 0xFFFF, equal_so_far = equal_before + (before >> 16);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const uint32_t my_equal = equal_so_far + __popc(equal[i] & lower);
      const uint32_t my_larger = larger_so_far + __popc(larger[i] & lower);
      const bool is_equal = (equal[i] >> lane & 1) != 0;
      if ((larger[i] >> lane & 1) != 0 || (is_equal && my_equal < threshold.equal)) {
        const uint32_t equal_kept =
            min(my_equal, threshold.equal) - min(equal_before, threshold.equal);
        keys[kept + my_larger + equal_kept] = key[i];
        columns[kept + my_larger + equal_kept] = column[i];
        least = min(least, key[i]);
      }
      larger_so_far += __popc(larger[i]);
      equal_so_far += __popc(equal[i]);
    }
    const uint32_t equal_after = equal_before + (total >> 16);
    kept +=
        (total & 0xFFFF) + min(equal_after, threshold.equal) - min(equal_before, threshold.equal);
    equal_before = equal_after;
    __syncthreads();  // before the sums are written again
  }
  least = __reduce_min_sync(kFullWarp, least);
  if (lane == 0) scratch->warp_sums[0][warp] = least;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kTopkWarps; ++w) least = min(least, scratch->warp_sums[0][w]);
  __syncthreads();
  return least;
}

// Candidates of a slice of any size, with their columns in the row's range.
__device__ __forceinline__ TopkCandidates CollectLargest(const TopkSlice& slice, int origin,
                                                         uint32_t k, uint32_t* keys,
                                                         int32_t* columns, TopkScratch* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int mine = warp * kWarpChunk + 4 * lane;
  int count = 0, turn = 0;
  uint32_t least = kLeastTopkKey;  // of a column that is appended
  uint4 next[kTopkVectors];
  uint32_t next_there[kTopkVectors];
  int chunk = slice.begin & ~3;
#pragma unroll
  for (int j = 0; j < kTopkVectors; ++j) {
    next[j] = LoadKeys(slice, chunk + mine + 128 * j, &next_there[j]);
  }
#pragma unroll 1
  for (; chunk < slice.end; chunk += kTopkChunk) {
    uint4 four[kTopkVectors];
    uint32_t there[kTopkVectors];
#pragma unroll
    for (int j = 0; j < kTopkVectors; ++j) {
      four[j] = next[j], there[j] = next_there[j];
      next[j] = LoadKeys(slice, chunk + kTopkChunk + mine + 128 * j, &next_there[j]);
    }
    uint32_t base = 0;
    WarpOrder order[kTopkVectors];
#pragma unroll 1
    while (true) {
      uint32_t sum = 0;
#pragma unroll
      for (int j = 0; j < kTopkVectors; ++j) {
        there[j] &= (four[j].x >= least ? 1u : 0) | (four[j].y >= least ? 2u : 0) |
                    (four[j].z >= least ? 4u : 0) | (four[j].w >= least ? 8u : 0);
        order[j] = OrderInWarp(there[j]);
        sum += order[j].all;
      }
      uint32_t* sums = scratch->warp_sums[turn];
      turn ^= 1;  // the next sums go where nobody reads any more
      if (lane == 0) sums[warp] = sum;
      __syncthreads();
      uint32_t total = 0;
      base = count;
#pragma unroll
      for (int w = 0; w < kTopkWarps; ++w) {
        base += w < warp ? sums[w] : 0;
        total += sums[w];
      }
      if (count + total <= kTopkCandidates) {
        count += total;
        break;
      }
      __syncthreads();  // the sums are read: Cut has the same buffer
      least = Cut(keys, columns, count, k, scratch) + 1;
      count = k;
    }
#pragma unroll
    for (int j = 0; j < kTopkVectors; ++j) {
      const uint32_t key[4] = {four[j].x, four[j].y, four[j].z, four[j].w};
      uint32_t at = base + order[j].before;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if ((there[j] >> i & 1) != 0) {
          keys[at] = key[i];
          columns[at] = chunk + mine + 128 * j + i - origin;
          ++at;
        }
      }
      base += order[j].all;
    }
  }
  __syncthreads();
  return {keys, 0, count};
}

}  // namespace fastattn::cuda
