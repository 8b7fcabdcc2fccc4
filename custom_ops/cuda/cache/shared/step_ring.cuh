// A streaming warp's next steps of loads, under way into shared memory.
#pragma once

#include <cstdint>

#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/cache/shared/stream_grid.cuh"
#include "cuda/common/shared_address.cuh"

namespace fastattn::cuda {

// Steps on their way into shared memory. Ahead in registers they would take those of a CTA more an
// SM, and a bias or a norm left room for one step only.
inline constexpr int kStepsAhead = 2;

// A warp's ring of kStepsAhead steps in shared memory, kParts tensors of them. Every lane copies
// and reads its own bytes only: it waits for its own copies, and for no other thread.
template <typename Lane, int kParts>
struct StepRing {
  static constexpr int kVectors = Lane::kWords / 4;  // of 16 bytes, a part
  static constexpr int kPart = kVectors * 32 * 16;   // bytes
  static constexpr int kStep = kParts * kPart;
  static constexpr int kBytes = kStreamThreads / 32 * kStepsAhead * kStep;
  static_assert(Lane::kWords % 4 == 0 && kStepsAhead == 2);

  uint32_t lane;      // address of the lane's bytes
  uint32_t slot = 0;  // offset of the step that is next: 0 or kStep

  __device__ __forceinline__ explicit StepRing(char* space)
      : lane(SharedAddress(space) + threadIdx.x / 32 * (kStepsAhead * kStep) +
             threadIdx.x % 32 * 16) {}

  __device__ __forceinline__ uint32_t Address(int part, int i) const {
    return lane + slot + part * kPart + i * 512;
  }

  // Asks for a lane's values of the step that is next. kShared: other warps read them, too.
  template <bool kShared>
  __device__ __forceinline__ void Copy(int part, const char* from) const {
    if (!Lane::IsActive(threadIdx.x % Lane::kLanes)) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const char* source = from + Halves<Lane::kWords, Lane::kDistance>::Offset(i);
      if constexpr (kShared) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(Address(part, i)),
                     "l"(source)
                     : "memory");
      } else {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(Address(part, i)),
                     "l"(source)
                     : "memory");
      }
    }
  }

  // Ends a step's copies, of which there may be none.
  __device__ __forceinline__ void Commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
    slot ^= kStep;
  }

  // Waits for the step that is next.
  __device__ __forceinline__ void Wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStepsAhead - 1) : "memory");
  }

  // Waits for all that are under way: a CTA that ends gives its shared memory to the next one.
  static __device__ __forceinline__ void Drain() {
    asm volatile("cp.async.wait_all;" ::: "memory");
  }

  __device__ __forceinline__ void Read(int part, uint32_t (&words)[Lane::kWords]) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[4 * i]), "=r"(words[4 * i + 1]), "=r"(words[4 * i + 2]),
                     "=r"(words[4 * i + 3])
                   : "r"(Address(part, i))
                   : "memory");
    }
    if (!Lane::IsActive(threadIdx.x % Lane::kLanes)) {
#pragma unroll
      for (int i = 0; i < Lane::kWords; ++i) words[i] = 0;
    }
  }
};

}  // namespace fastattn::cuda
