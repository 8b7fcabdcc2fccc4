// Lines of memory asked for ahead of a kernel's turn.
//
// A kernel that LaunchPdl launches is set up under the end of its predecessor, and waits for that
// one's results (pdl.cuh). Prefetching into L2 is the one access to global memory that it may make
// before: what the predecessor still writes arrives there as well, and nothing of it is looked at.
#pragma once

#include <cstdint>

#include "params/index_array.h"

namespace fastattn::cuda {

__device__ __forceinline__ void PrefetchL2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ void PrefetchIndex(const IndexArray& indices, int64_t i) {
  PrefetchL2(static_cast<const char*>(indices.data) + i * (indices.wide ? 8 : 4));
}

}  // namespace fastattn::cuda
