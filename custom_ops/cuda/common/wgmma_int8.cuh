// Warpgroup matrix products (wgmma, sm_90a) on int8 operands with int32 accumulators; registers of
// an accumulator, and of a left operand in registers, as in wgmma.cuh.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

#define FASTATTN_ACC4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define FASTATTN_ACC16(c, d, i)                                                   \
  FASTATTN_ACC4(c, d, i), FASTATTN_ACC4(c, d, i + 4), FASTATTN_ACC4(c, d, i + 8), \
      FASTATTN_ACC4(c, d, i + 12)

// `c` is "+r", or "=r" with `add` 0: what was in the accumulator does not matter then.
#define FASTATTN_INT8(c, add)                                                           \
  asm volatile(                                                                         \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"                                \
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 " \
      "}, {%32, %33, %34, %35}, %36, p;\n\t}"                                           \
      : FASTATTN_ACC16(c, d, 0), FASTATTN_ACC16(c, d, 16)                               \
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
               : FASTATTN_ACC16("+r", d, 0), FASTATTN_ACC16("+r", d, 16)
               : "n"(kPending)
               : "memory");
}

#undef FASTATTN_INT8
#undef FASTATTN_ACC16
#undef FASTATTN_ACC4

}  // namespace fastattn::cuda
