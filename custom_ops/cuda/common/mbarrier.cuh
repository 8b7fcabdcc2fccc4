// mbarriers in shared memory and the named barriers of a CTA (sm_90).
#pragma once

#include <cstdint>

#include "cuda/common/shared_address.cuh"

namespace fastattn::cuda {

__device__ __forceinline__ void InitBarrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// Whether this lane is the one of its warp that acts for all. Unlike after a comparison of lanes,
// the compiler knows that one lane alone goes on: an instruction whose operands belong to the warp
// (TMA's, a barrier's initialisation) then stands there once, not in a loop over the lanes.
__device__ __forceinline__ bool ElectOne() {
  uint32_t elected = 0;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "@p mov.u32 %0, 1;\n\t}"
      : "+r"(elected));
  return elected != 0;
}

// Makes initialised barriers visible to TMA.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary shared-memory accesses before later ones of the tensor cores and of
// TMA.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// Arrivals that a barrier counts for a warp: one lane arrives for all. racecheck does not see that
// __syncwarp puts the other lanes' accesses ahead of it, so that every lane arrives in a build with
// FASTATTN_RACECHECK.
#if defined(FASTATTN_RACECHECK)
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif

__device__ __forceinline__ bool ArrivesForWarp(int lane) {
  return kWarpArrivals == 32 || lane == 0;
}

__device__ __forceinline__ void ArriveWarp(uint64_t* barrier) {
  __syncwarp();
  if (ArrivesForWarp(threadIdx.x % 32)) Arrive(barrier);
}

// Arrives and announces `bytes` that TMA will deliver in this phase.
__device__ __forceinline__ void ArriveExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

#define FASTATTN_TEST_PHASE(instruction)         \
  asm volatile(                                  \
      "{\n\t.reg .pred p;\n\t"                   \
      "mbarrier." instruction                    \
      ".parity.shared::cta.b64 p, [%1], %2;\n\t" \
      "selp.u32 %0, 1, 0, p;\n\t}"               \
      : "=r"(done)                               \
      : "r"(SharedAddress(barrier)), "r"(parity) \
      : "memory")

__device__ __forceinline__ bool TryWait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  FASTATTN_TEST_PHASE("try_wait");
  return done != 0;
}

// Whether the phase of the given parity is complete, at once.
__device__ __forceinline__ bool TestWait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  FASTATTN_TEST_PHASE("test_wait");
  return done != 0;
}

#undef FASTATTN_TEST_PHASE

// Waits until the phase of the given parity is complete. With FASTATTN_SPIN_LIMIT (clock cycles)
// defined, a wait that lasts longer ends the kernel with an error instead of hanging.
__device__ __forceinline__ void Wait(uint64_t* barrier, uint32_t parity) {
#if defined(FASTATTN_SPIN_LIMIT)
  const long long start = clock64();
  while (!TryWait(barrier, parity)) {
    if (clock64() - start > FASTATTN_SPIN_LIMIT) __trap();
  }
#else
  while (!TryWait(barrier, parity)) {
  }
#endif
}

// Waits at named barrier `id` until kThreads threads have arrived. ArriveNamed arrives only.
template <int kThreads>
__device__ __forceinline__ void SyncNamed(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ void ArriveNamed(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

}  // namespace fastattn::cuda
