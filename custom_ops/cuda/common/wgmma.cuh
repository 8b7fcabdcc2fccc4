// Warpgroup matrix products (wgmma, sm_90a) of e4m3 and 8-bit floats with fp32 accumulators.
//
// Accumulator d of a 64 x n product: register 4 * j + 2 * h + e of a thread is row
// 16 * (warp % 4) + lane / 4 + 8 * h, column 8 * j + 2 * (lane % 4) + e.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/common/wgmma_lists.h"

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

// Orders accesses to registers before the products that follow (wgmma.fence).
__device__ __forceinline__ void FenceProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending groups of products are in flight. `d` names the registers that the
// finished products write, so that the compiler moves no access to them across the wait.
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

template <int kPending>
__device__ __forceinline__ void WaitProducts(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned %128;"
               : FASTATTN_ACC128("+f", d)
               : "n"(kPending)
               : "memory");
}

// Waits until at most kPending groups of products are in flight, for accumulators that KeepFloats
// keeps.
template <int kPending>
__device__ __forceinline__ void WaitGroups() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to registers that products write, or read, across this
// place.
template <int kCount>
__device__ __forceinline__ void KeepFloats(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void KeepRegisters(uint32_t (&a)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// `right` is the type of b. `c` is "+f", or "=f" with `add` 0: the product then ignores what was in
// the accumulator.
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
// d (+)= a * b: 64 x 128 scores, both operands in shared memory, a of e4m3.
template <bool kAdd, DType kRight = DType::kE4M3>
__device__ __forceinline__ void MultiplyShared(float (&d)[64], uint64_t a, uint64_t b) {
  static_assert(kRight == DType::kE4M3 || kRight == DType::kE5M2);
  FASTATTN_FORMS(FASTATTN_SHARED128, kRight == DType::kE4M3, "e4m3", "e5m2")
}

// d (+)= a * b with a in registers: bytes 4 * (lane % 4) .. + 3 of rows lane / 4 and + 8 for k from
// 0 (a[0], a[1]) and from 16 (a[2], a[3]).
template <bool kAdd, DType kRight = DType::kE4M3>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[64], const uint32_t* a, uint64_t b) {
  static_assert(kRight == DType::kE4M3 || kRight == DType::kE5M2);
  FASTATTN_FORMS(FASTATTN_REGISTERS128, kRight == DType::kE4M3, "e4m3", "e5m2")
}

template <bool kAdd, DType kRight = DType::kE4M3>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[32], const uint32_t* a, uint64_t b) {
  static_assert(kRight == DType::kE4M3 || kRight == DType::kE5M2);
  FASTATTN_FORMS(FASTATTN_REGISTERS64, kRight == DType::kE4M3, "e4m3", "e5m2")
}

// MultiplyRegisters of 64 x 128, which adds if `add`. A predicate and no branch: ptxas takes
// products of two branches one by one.
__device__ __forceinline__ void MultiplyRegistersIf(float (&d)[64], const uint32_t* a, uint64_t b,
                                                    int add) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" FASTATTN_LIST64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n\t}"
      : FASTATTN_ACC64("+f", d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

#undef FASTATTN_REGISTERS64
#undef FASTATTN_REGISTERS128
#undef FASTATTN_SHARED128

// Lowers the register count of this warpgroup to kRegisters; ClaimRegisters raises it.
template <int kRegisters>
__device__ __forceinline__ void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fastattn::cuda
