// Warpgroup matrix products (wgmma, sm_90a) of 16-bit operands in the shapes of latent attention.
// Registers of accumulators as in cuda/common/wgmma.cuh, descriptors from there and from
// wgmma_half.cuh.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/common/wgmma.cuh"
#include "cuda/common/wgmma_lists.h"

namespace fastattn::cuda::mla_sparse_sm90 {

// `c` is "+f", or "=f" with `add` 0: the product then ignores what was in the accumulator.
#define FASTATTN_SCORES(type, c, add)                                                  \
  asm volatile(                                                                        \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTATTN_LIST32 \
      "}, %32, %33, p, 1, 1, 0, 0;\n\t}"                                               \
      : FASTATTN_ACC32(c, d)                                                           \
      : "l"(a), "l"(b), "n"(add))
#define FASTATTN_OUTPUTS(type)                                                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTATTN_LIST64 \
               "}, %64, %65, 1, 1, 1, 0, 1;"                                                     \
               : FASTATTN_ACC64("+f", d)                                                         \
               : "l"(a), "l"(b))
#define FASTATTN_NARROW8(type, c, add)                           \
  asm volatile(                                                  \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %6, 0;\n\t"          \
      "wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type \
      " {%0, %1, %2, %3}, %4, "                                  \
      "%5, p, 1, 1, %7, 0;\n\t}"                                 \
      : FASTATTN_ACC4(c, d, 0)                                   \
      : "l"(a), "l"(b), "n"(add), "n"(kTransposed))
#define FASTATTN_NARROW16(type, c, add)                           \
  asm volatile(                                                   \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %10, 0;\n\t"          \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type \
      " {%0, %1, %2, %3, "                                        \
      "%4, %5, %6, %7}, %8, %9, p, 1, 1, %11, 0;\n\t}"            \
      : FASTATTN_ACC4(c, d, 0), FASTATTN_ACC4(c, d, 4)            \
      : "l"(a), "l"(b), "n"(add), "n"(kTransposed))

// d (+)= a * b: 64 x 64 of depth 16, both operands in shared memory, K-major.
template <DType kType, bool kAdd>
__device__ __forceinline__ void Scores(float (&d)[32], uint64_t a, uint64_t b) {
  FASTATTN_FORMS(FASTATTN_SCORES, kType == DType::kBFloat16, "bf16", "f16")
}

// d += a * b: 64 x 128 of depth 16, both operands in shared memory, a K-major, b N-major.
template <DType kType>
__device__ __forceinline__ void Outputs(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (kType == DType::kBFloat16) {
    FASTATTN_OUTPUTS("bf16");
  } else {
    FASTATTN_OUTPUTS("f16");
  }
}

// d (+)= a * b: 64 x 8 or 64 x 16 of depth 16, both operands in shared memory, b K-major.
// kTransposed: a is M-major.
template <DType kType, bool kAdd, int kTransposed>
__device__ __forceinline__ void Narrow(float (&d)[4], uint64_t a, uint64_t b) {
  FASTATTN_FORMS(FASTATTN_NARROW8, kType == DType::kBFloat16, "bf16", "f16")
}

template <DType kType, bool kAdd, int kTransposed>
__device__ __forceinline__ void Narrow(float (&d)[8], uint64_t a, uint64_t b) {
  FASTATTN_FORMS(FASTATTN_NARROW16, kType == DType::kBFloat16, "bf16", "f16")
}

#undef FASTATTN_NARROW16
#undef FASTATTN_NARROW8
#undef FASTATTN_OUTPUTS
#undef FASTATTN_SCORES

// Stores four 8 x 8 matrices of 16-bit values, or with kTransposed their transposes. Lanes 8 * i to
// 8 * i + 7 name the addresses of the rows of matrix i, whose registers are as those of an
// accumulator.
template <bool kTransposed>
__device__ __forceinline__ void StoreMatrices(uint32_t address, const uint32_t (&m)[4]) {
  if constexpr (kTransposed) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
        : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
  }
}

// Two matrices, transposed; lanes 0 to 15 name the addresses.
__device__ __forceinline__ void StoreTransposed(uint32_t address, const uint32_t (&m)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(m[0]), "r"(m[1])
               : "memory");
}

}  // namespace fastattn::cuda::mla_sparse_sm90
