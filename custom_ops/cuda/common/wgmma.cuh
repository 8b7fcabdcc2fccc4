// Warpgroup matrix products (wgmma, sm_90a) of e4m3 and 8-bit floats with fp32 accumulators.
//
// Accumulator d of a 64 x n product: register 4 * j + 2 * h + e of a thread is row
// 16 * (warp % 4) + lane / 4 + 8 * h, column 8 * j + 2 * (lane % 4) + e.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn::cuda {

// Describes a K-major operand in shared memory: rows of kRowBytes (= the swizzle's width), eight
// rows a swizzle pattern. Adding n / 16 moves the start by n bytes within the row.
template <int kRowBytes>
__device__ __forceinline__ uint64_t OperandDescriptor(uint32_t address) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr uint32_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint32_t kGroup = 8 * kRowBytes / 16;
  return uint64_t{kSwizzle << 30 | kGroup} << 32 | (1u << 16 | (address & 0x3FFFF) >> 4);
}

// Orders accesses to registers before the products that follow.
__device__ __forceinline__ void FenceProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Accumulators as operands: c is "+f", or "=f" where what was in them does not matter (so that they
// are no live registers before).
#define FASTATTN_ACC4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define FASTATTN_ACC16(c, d, i)                                                   \
  FASTATTN_ACC4(c, d, i), FASTATTN_ACC4(c, d, i + 4), FASTATTN_ACC4(c, d, i + 8), \
      FASTATTN_ACC4(c, d, i + 12)
#define FASTATTN_ACC32(c, d) FASTATTN_ACC16(c, d, 0), FASTATTN_ACC16(c, d, 16)
#define FASTATTN_ACC64(c, d) \
  FASTATTN_ACC32(c, d), FASTATTN_ACC16(c, d, 32), FASTATTN_ACC16(c, d, 48)

// Waits until at most kPending groups of products are in flight. The registers named are those that
// the finished products write or read: the compiler moves no access to them across the wait.
template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;"
               : FASTATTN_ACC64("+f", d)
               : "n"(kPending)
               : "memory");
}

template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[32]) {
  asm volatile("wgmma.wait_group.sync.aligned %32;"
               : FASTATTN_ACC32("+f", d)
               : "n"(kPending)
               : "memory");
}

template <int kCount>
__device__ __forceinline__ void KeepRegisters(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

#define FASTATTN_LIST32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_LIST64                                                                \
  FASTATTN_LIST32                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// `right` is the type of b; `c` is "+f", or "=f" with `add` 0: what was in the accumulator does not
// matter then.
#define FASTATTN_SHARED128(right, c, add)                                            \
  asm volatile(                                                                      \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"                             \
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3." right " {" FASTATTN_LIST64 \
      "}, %64, %65, p, 1, 1;\n\t}"                                                   \
      : FASTATTN_ACC64(c, d)                                                         \
      : "l"(a), "l"(b), "n"(add))
#define FASTATTN_REGISTERS128(right, c, add)                                         \
  asm volatile(                                                                      \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"                             \
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3." right " {" FASTATTN_LIST64 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n\t}"                                  \
      : FASTATTN_ACC64(c, d)                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add))
#define FASTATTN_REGISTERS64(right, c, add)                                         \
  asm volatile(                                                                     \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"                            \
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3." right " {" FASTATTN_LIST32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1;\n\t}"                                 \
      : FASTATTN_ACC32(c, d)                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add))
// Of one product, its four forms.
#define FASTATTN_FORMS(PRODUCT)                                    \
  static_assert(kRight == DType::kE4M3 || kRight == DType::kE5M2); \
  if constexpr (kRight == DType::kE4M3) {                          \
    if constexpr (kAdd) {                                          \
      PRODUCT("e4m3", "+f", 1);                                    \
    } else {                                                       \
      PRODUCT("e4m3", "=f", 0);                                    \
    }                                                              \
  } else {                                                         \
    if constexpr (kAdd) {                                          \
      PRODUCT("e5m2", "+f", 1);                                    \
    } else {                                                       \
      PRODUCT("e5m2", "=f", 0);                                    \
    }                                                              \
  }

// d (+)= a * b: 64 x 128 scores, both operands in shared memory, a of e4m3.
template <bool kAdd, DType kRight = DType::kE4M3>
__device__ __forceinline__ void MultiplyShared(float (&d)[64], uint64_t a, uint64_t b) {
  FASTATTN_FORMS(FASTATTN_SHARED128)
}

// d (+)= a * b with a in registers: bytes 4 * (lane % 4) .. + 3 of rows lane / 4 and + 8 for k from
// 0 (a[0], a[1]) and from 16 (a[2], a[3]).
template <bool kAdd, DType kRight = DType::kE4M3>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[64], const uint32_t* a, uint64_t b) {
  FASTATTN_FORMS(FASTATTN_REGISTERS128)
}

template <bool kAdd, DType kRight = DType::kE4M3>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[32], const uint32_t* a, uint64_t b) {
  FASTATTN_FORMS(FASTATTN_REGISTERS64)
}

#undef FASTATTN_FORMS
#undef FASTATTN_REGISTERS64
#undef FASTATTN_REGISTERS128
#undef FASTATTN_SHARED128
#undef FASTATTN_LIST64
#undef FASTATTN_LIST32
#undef FASTATTN_ACC64
#undef FASTATTN_ACC32
#undef FASTATTN_ACC16
#undef FASTATTN_ACC4

// Gives registers of this warpgroup back, or takes them.
template <int kRegisters>
__device__ __forceinline__ void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fastattn::cuda
