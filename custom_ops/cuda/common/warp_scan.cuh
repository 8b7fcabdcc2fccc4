// Scans over the lanes of a warp.
#pragma once

#include "cuda/common/lane.cuh"

namespace fastattn::cuda {

// Exclusive scan: the maximum of `x` (at least 0) over the lanes before this one, and 0 in the
// first lane. All lanes take part.
template <typename T>
__device__ __forceinline__ T MaxOfLanesBefore(T x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kFullWarp, x, distance);
    if (lane >= distance) x = max(x, other);
  }
  const T before = __shfl_up_sync(kFullWarp, x, 1);
  return lane == 0 ? T{0} : before;
}

}  // namespace fastattn::cuda
