// Tensor-core and asynchronous-copy instructions that sm_80 has, one function each.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/common/shared_address.cuh"

namespace fastattn::cuda {

// c += a * b, 16 x 8 x 16: row-major a, column-major b, fp32 accumulators.
template <DType kOperand>
__device__ __forceinline__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (kOperand == DType::kFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    static_assert(kOperand == DType::kBFloat16);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

__device__ __forceinline__ uint2 LoadShared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}

// Four 8x8 matrices of 16-bit elements, transposed: lane l gives the address of row l % 8 of matrix
// l / 8 and gets elements (row 2 * (l % 4) and the next, column l / 4) of each.
__device__ __forceinline__ uint4 LoadMatricesTransposed(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// Four 8x8 matrices of 16-bit elements whose rows lie at the addresses of lanes 8 i .. 8 i + 7:
// lane (g, t) gets elements 2 t and 2 t + 1 of row g of each.
__device__ __forceinline__ uint4 LoadMatrices(uint32_t address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// Transposes an 8x8 matrix of 16-bit elements that lies in a warp's registers, two a lane.
__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t elements) {
  uint32_t v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(elements));
  return v;
}

// What the L2 cache does with lines that are read: those of keys that are read once make room for
// others first.
__device__ __forceinline__ uint64_t CachePolicy(bool keys_read_once) {
  uint64_t first, normal;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
  return keys_read_once ? first : normal;
}

// Copies 16 bytes to shared memory without registers; with `bytes` = 0 it writes zeros instead.
__device__ __forceinline__ void CopyAsync16(uint32_t target, const void* source, uint64_t policy,
                                            int bytes = 16) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(target),
      "l"(source), "r"(bytes), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Names a kernel's parameters before the kernel waits for the one before it. No instruction is left
// of that (common/parameters.cuh has what does read them early), but other registers are chosen:
// with those the kernels were measured.
template <typename T>
__device__ __forceinline__ void NameParameters(const T& parameters) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&parameters);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); i += 16) {
    asm volatile("" ::"r"(words[i]));
  }
}

}  // namespace fastattn::cuda
