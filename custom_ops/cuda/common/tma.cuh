// TMA (the Tensor Memory Accelerator of sm_90): its instructions, and the host's encoding of tensor
// maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/device_facts.h"
#include "cuda/common/mbarrier.cuh"

namespace fastattn::cuda {

// Copies a box of a 3-D tensor into shared memory; its bytes count towards the barrier's phase. TMA
// fills with zeros what lies outside of the tensor, and never reads it.
__device__ __forceinline__ void CopyBox(const CUtensorMap* map, void* target, uint64_t* barrier,
                                        int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(SharedAddress(target)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Prefetches a box into the L2 cache.
__device__ __forceinline__ void PrefetchBox(const CUtensorMap* map, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map),
               "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

// Copies `bytes` (a multiple of 16, both sides aligned to 16) into shared memory.
__device__ __forceinline__ void CopyBulk(const void* source, void* target, uint64_t* barrier,
                                         uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(target)),
      "l"(source), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

// What createpolicy makes for lines that leave the L2 cache before others.
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000;

// CopyBox and CopyBulk of data that nobody reads again soon.
__device__ __forceinline__ void CopyBoxOnce(const CUtensorMap* map, void* target, uint64_t* barrier,
                                            int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(SharedAddress(target)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(kEvictFirst)
      : "memory");
}

__device__ __forceinline__ void CopyBulkOnce(const void* source, void* target, uint64_t* barrier,
                                             uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(SharedAddress(target)),
      "l"(source), "r"(bytes), "r"(SharedAddress(barrier)), "l"(kEvictFirst)
      : "memory");
}

__device__ __forceinline__ void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A tensor of bytes, its innermost dimension first.
struct ByteTensor {
  const void* data;
  uint64_t size[3];
  uint64_t stride[2];  // bytes, of the second and third dimension; multiples of 16
  uint32_t box[3];
  CUtensorMapSwizzle swizzle;
};

// Encodes a tensor map. A context must be current in the calling thread.
inline cudaError_t EncodeMap(const ByteTensor& tensor, CUtensorMap* map) {
  const Driver* driver = nullptr;
  const cudaError_t status = GetDriver(&driver);
  if (status != cudaSuccess) return status;
  if (driver->encode_tiled == nullptr) return cudaErrorNotSupported;
  // The driver's function takes a pointer to mutable data, even to data that is only read.
  void* data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(tensor.data));
  const cuuint64_t size[3] = {tensor.size[0], tensor.size[1], tensor.size[2]};
  const cuuint64_t stride[2] = {tensor.stride[0], tensor.stride[1]};
  const cuuint32_t box[3] = {tensor.box[0], tensor.box[1], tensor.box[2]};
  const cuuint32_t step[3] = {1, 1, 1};
  return ToRuntime(driver->encode_tiled(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, data, size, stride,
                                        box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, tensor.swizzle,
                                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

}  // namespace fastattn::cuda
