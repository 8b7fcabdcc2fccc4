// Warpgroup matrix products (wgmma, sm_90a) on int8 operands with int32 accumulators; registers of
// an accumulator, and of a left operand in registers, as in wgmma.cuh.
#pragma once

#include <cstdint>

#include "cuda/common/wgmma_lists.h"

namespace fastattn::cuda {

// `c` is "+r", or "=r" with `add` 0: the product then ignores what was in the accumulator.
#define FASTATTN_INT8(c, add)                                              \
  asm volatile(                                                            \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"                   \
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" FASTATTN_LIST32 \
      " }, {%32, %33, %34, %35}, %36, p;\n\t}"                             \
      : FASTATTN_ACC32(c, d)                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add))

// d (+)= a * b: 64 x 64, a in registers.
template <bool kAdd>
__device__ __forceinline__ void MultiplyInt8(int32_t (&d)[32], const uint32_t* a, uint64_t b) {
  if constexpr (kAdd) {
    FASTATTN_INT8("+r", 1);
  } else {
    FASTATTN_INT8("=r", 0);
  }
}

// As WaitProducts() of wgmma.cuh.
template <int kPending>
__device__ __forceinline__ void WaitProducts(int32_t (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;"
               : FASTATTN_ACC32("+r", d)
               : "n"(kPending)
               : "memory");
}

#undef FASTATTN_INT8

}  // namespace fastattn::cuda
