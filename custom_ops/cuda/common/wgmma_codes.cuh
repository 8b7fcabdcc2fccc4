// Warpgroup matrix products (wgmma, sm_90a) of two 8-bit operands: e4m3 with e4m3 or e5m2 and fp32
// accumulators, int8 with int8 and int32 accumulators. 64 x 128 results, the left operand in
// registers; registers as in wgmma.cuh.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn::cuda {

#define FASTATTN_ACC4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define FASTATTN_ACC16(c, d, i)                                                   \
  FASTATTN_ACC4(c, d, i), FASTATTN_ACC4(c, d, i + 4), FASTATTN_ACC4(c, d, i + 8), \
      FASTATTN_ACC4(c, d, i + 12)
#define FASTATTN_ACC64(c, d)                                                         \
  FASTATTN_ACC16(c, d, 0), FASTATTN_ACC16(c, d, 16), FASTATTN_ACC16(c, d, 32), \
      FASTATTN_ACC16(c, d, 48)
#define FASTATTN_LIST64                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `c`: how the accumulator is named, which need not be defined where `add` is 0. `scales`: of both
// operands, which products of integers do not have.
#define FASTATTN_CODES(types, scales, c, add)                              \
  asm volatile(                                                            \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"                   \
      "wgmma.mma_async.sync.aligned.m64n128k32." types " {" FASTATTN_LIST64 \
      "}, {%64, %65, %66, %67}, %68, p" scales ";\n\t}"                    \
      : FASTATTN_ACC64(c, d)                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add))

// d (+)= a * b, a of e4m3.
template <DType kRight, bool kAdd>
__device__ __forceinline__ void MultiplyCodes(float (&d)[64], const uint32_t* a, uint64_t b) {
  static_assert(kRight == DType::kE4M3 || kRight == DType::kE5M2);
  if constexpr (kRight == DType::kE4M3 && kAdd) {
    FASTATTN_CODES("f32.e4m3.e4m3", ", 1, 1", "+f", 1);
  } else if constexpr (kRight == DType::kE4M3) {
    FASTATTN_CODES("f32.e4m3.e4m3", ", 1, 1", "=f", 0);
  } else if constexpr (kAdd) {
    FASTATTN_CODES("f32.e4m3.e5m2", ", 1, 1", "+f", 1);
  } else {
    FASTATTN_CODES("f32.e4m3.e5m2", ", 1, 1", "=f", 0);
  }
}

// d (+)= a * b of int8.
template <DType kRight, bool kAdd>
__device__ __forceinline__ void MultiplyCodes(int32_t (&d)[64], const uint32_t* a, uint64_t b) {
  static_assert(kRight == DType::kInt8);
  if constexpr (kAdd) {
    FASTATTN_CODES("s32.s8.s8", "", "+r", 1);
  } else {
    FASTATTN_CODES("s32.s8.s8", "", "=r", 0);
  }
}

// As WaitProducts() of wgmma.cuh.
template <int kPending>
__device__ __forceinline__ void WaitProducts(int32_t (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;"
               : FASTATTN_ACC64("+r", d)
               : "n"(kPending)
               : "memory");
}

#undef FASTATTN_CODES
#undef FASTATTN_LIST64
#undef FASTATTN_ACC64
#undef FASTATTN_ACC16
#undef FASTATTN_ACC4

}  // namespace fastattn::cuda
