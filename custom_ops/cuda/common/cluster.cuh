// CTAs of a cluster (sm_90 and newer): their barrier, and loads from each other's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/shared_address.cuh"

namespace fastattn::cuda {

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// The two halves of the cluster's barrier. A thread's accesses before it arrives come before those
// of others behind their wait. All threads of the cluster take part in both.
__device__ __forceinline__ void ArriveAtCluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void WaitForCluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Address in the shared memory of CTA `rank` that corresponds to `address` in this CTA's.
__device__ __forceinline__ uint32_t AddressInCluster(uint32_t rank, uint32_t address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(address), "r"(rank));
#endif
  return address;
}

// What CTA `rank` has where `pointer` points to in this CTA's shared memory.
__device__ __forceinline__ uint32_t LoadClusterWord(uint32_t rank, const uint32_t* pointer) {
  uint32_t v = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(v)
               : "r"(AddressInCluster(rank, SharedAddress(pointer)))
               : "memory");
#endif
  return v;
}

__device__ __forceinline__ uint2 LoadClusterPair(uint32_t rank, const uint32_t* pointer) {
  uint2 v = make_uint2(0, 0);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(AddressInCluster(rank, SharedAddress(pointer)))
               : "memory");
#endif
  return v;
}

__device__ __forceinline__ uint4 LoadCluster16(uint32_t address) {
  uint4 v = make_uint4(0, 0, 0, 0);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
#endif
  return v;
}

__device__ __forceinline__ float2 LoadCluster8(uint32_t address) {
  float2 v = make_float2(0.0f, 0.0f);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address)
               : "memory");
#endif
  return v;
}

}  // namespace fastattn::cuda
