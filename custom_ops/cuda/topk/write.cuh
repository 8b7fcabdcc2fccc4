// Writes the indices of the columns that bitmaps mark, in ascending order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/topk/select.cuh"

namespace fastattn::cuda {

// Bits of the columns from `first` on: what is chosen for sure, and what is equal to the k-th
// largest, of which the first are chosen.
struct TopkBitmaps {
  uint32_t* larger;
  uint32_t* equal;
  uint32_t* places;  // a word's: room for the numbers before it
  int words;
};

// Chosen before a word: a window has fewer than 2^19 columns, and k is at most 2^12.
inline constexpr int kEqualBits = 19;

// `before`: larger and equal ones before the window; `wanted`: equal ones to choose. Returns what
// comes before the next window. The bitmaps have been written behind a barrier.
template <int kThreads>
__device__ __forceinline__ uint2 WriteWindow(const TopkBitmaps& maps, int first, uint2 before,
                                             uint32_t wanted, int32_t* out, TopkScratch* scratch) {
  constexpr uint32_t kEqualMask = (1u << kEqualBits) - 1;
  // An odd number of words a thread, whose accesses then spread over the banks.
  const int share = (maps.words + kThreads - 1) / kThreads | 1;
  const int begin = min(static_cast<int>(threadIdx.x) * share, maps.words);
  const int end = min(begin + share, maps.words);
  uint32_t sum = 0;
#pragma unroll 1
  for (int w = begin; w < end; ++w) {
    sum += (__popc(maps.larger[w]) << kEqualBits) + __popc(maps.equal[w]);
  }
  uint32_t place = SumBefore<kThreads>(sum, scratch->warp_sums[0]);
#pragma unroll 1
  for (int w = begin; w < end; ++w) {
    maps.places[w] = place;
    place += (__popc(maps.larger[w]) << kEqualBits) + __popc(maps.equal[w]);
  }
  if (threadIdx.x == kThreads - 1) {
    scratch->window[0] = before.x + (place >> kEqualBits);
    scratch->window[1] = before.y + (place & kEqualMask);
  }
  __syncthreads();
#pragma unroll 1
  for (int w = threadIdx.x; w < maps.words; w += kThreads) {
    const uint32_t larger = maps.larger[w], at = maps.places[w];
    uint32_t equals = before.y + (at & kEqualMask);
    const uint32_t equal = equals < wanted ? maps.equal[w] : 0;
    uint32_t larger_so_far = before.x + (at >> kEqualBits), left = larger | equal;
#pragma unroll 1
    while (left != 0) {
      const int bit = __ffs(left) - 1;
      left &= left - 1;
      const bool is_equal = (equal >> bit & 1) != 0;
      if (!is_equal || equals < wanted) {
        out[larger_so_far + min(equals, wanted)] = first + 32 * w + bit;
      }
      equals += is_equal;
      larger_so_far += !is_equal;
    }
  }
  return make_uint2(scratch->window[0], scratch->window[1]);
}

}  // namespace fastattn::cuda
