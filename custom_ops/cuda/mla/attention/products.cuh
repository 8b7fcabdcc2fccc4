// Warpgroup matrix products (wgmma, sm_90a) of bf16 operands in the shapes of dense latent
// attention. Registers of accumulators as in cuda/common/wgmma.cuh, descriptors from there and from
// wgmma_half.cuh.
#pragma once

#include <cstdint>

#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_half.cuh"
#include "cuda/common/wgmma_lists.h"

namespace fastattn::cuda::mla_attention {

#define FASTATTN_DENSE_ACC128(d)                                                     \
  FASTATTN_ACC64("+f", d), FASTATTN_ACC16("+f", d, 64), FASTATTN_ACC16("+f", d, 80), \
      FASTATTN_ACC16("+f", d, 96), FASTATTN_ACC16("+f", d, 112)
#define FASTATTN_DENSE_LIST128                                                             \
  FASTATTN_LIST64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "     \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
  "%125, %126, %127"

// d (+)= a * b: 64 x 64 of depth 16, both operands in shared memory, K-major.
__device__ __forceinline__ void MultiplyScores(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FASTATTN_LIST32
      "}, %32, %33, p, 1, 1, 0, 0;\n\t}"
      : FASTATTN_ACC32("+f", d)
      : "l"(a), "l"(b), "r"(add));
}

// d += a * b: 64 x 256 of depth 16, a in registers, b N-major in shared memory.
__device__ __forceinline__ void MultiplyValues(float (&d)[128], const uint32_t* a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" FASTATTN_DENSE_LIST128
               "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
               : FASTATTN_DENSE_ACC128(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same with a in shared memory, K-major.
__device__ __forceinline__ void MultiplyValues(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" FASTATTN_DENSE_LIST128
               "}, %128, %129, 1, 1, 1, 0, 1;"
               : FASTATTN_DENSE_ACC128(d)
               : "l"(a), "l"(b));
}

#define FASTATTN_DENSE_LOW(d)                                                           \
  FASTATTN_ACC16("+f", d, 0), FASTATTN_ACC16("+f", d, 16), FASTATTN_ACC16("+f", d, 32), \
      FASTATTN_ACC16("+f", d, 48)
#define FASTATTN_DENSE_HIGH(d)                                                           \
  FASTATTN_ACC16("+f", d, 64), FASTATTN_ACC16("+f", d, 80), FASTATTN_ACC16("+f", d, 96), \
      FASTATTN_ACC16("+f", d, 112)
#define FASTATTN_DENSE_REGISTERS(acc, b)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FASTATTN_LIST64 \
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                               \
               : acc                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define FASTATTN_DENSE_SHARED(acc, b)                                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" FASTATTN_LIST64 \
               "}, %64, %65, 1, 1, 1, 0, 1;"                                             \
               : acc                                                                     \
               : "l"(a), "l"(b))

// The same as two products of 128 columns, `step` between their descriptors: ptxas wants no
// instruction that needs more registers than a kernel is launched with.
__device__ __forceinline__ void MultiplyValueHalves(float (&d)[128], const uint32_t* a, uint64_t b,
                                                    int step) {
  FASTATTN_DENSE_REGISTERS(FASTATTN_DENSE_LOW(d), b);
  FASTATTN_DENSE_REGISTERS(FASTATTN_DENSE_HIGH(d), b + step);
}
__device__ __forceinline__ void MultiplyValueHalves(float (&d)[128], uint64_t a, uint64_t b,
                                                    int step) {
  FASTATTN_DENSE_SHARED(FASTATTN_DENSE_LOW(d), b);
  FASTATTN_DENSE_SHARED(FASTATTN_DENSE_HIGH(d), b + step);
}

#undef FASTATTN_DENSE_LOW
#undef FASTATTN_DENSE_HIGH
#undef FASTATTN_DENSE_REGISTERS
#undef FASTATTN_DENSE_SHARED

// Stores four 8 x 8 matrices of 16-bit values, whose registers are as those of an accumulator.
// Lanes 8 * i to 8 * i + 7 name the addresses of the rows of matrix i.
__device__ __forceinline__ void StoreMatrices(uint32_t address, const uint32_t* m) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

}  // namespace fastattn::cuda::mla_attention
