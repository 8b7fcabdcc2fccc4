// Warpgroup matrix products (wgmma, sm_90a) on 16-bit operands with fp32 accumulators; registers of
// an accumulator as in wgmma.cuh.
//
// A left operand in registers, 64 x 16: words 0 and 1 are channels 2 * (lane % 4), + 1 of rows
// lane / 4 and + 8, words 2 and 3 the same of the channels 8 further on.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/common/wgmma_lists.h"

namespace fastattn::cuda {

// Describes a right operand whose columns lie side by side (N-major): blocks of 64 columns, in each
// a row of 128 bytes for every k, swizzled over 128 bytes. Blocks are kBlockBytes apart. Adding
// 2048 / 16 moves the start by 16 k.
template <int kBlockBytes>
__device__ __forceinline__ uint64_t TransposedDescriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | (kBlockBytes / 16) << 16 | (address & 0x3FFFF) >> 4;
}

// `c` is "+f", or "=f" with `add` 0: the product then ignores what was in the accumulator.
#define FASTATTN_SHARED128(type, c, add)                                                \
  asm volatile(                                                                         \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTATTN_LIST64 \
      "}, %64, %65, p, 1, 1, 0, 0;\n\t}"                                                \
      : FASTATTN_ACC64(c, d)                                                            \
      : "l"(a), "l"(b), "n"(add))
#define FASTATTN_REGISTERS128(type, c, add)                                             \
  asm volatile(                                                                         \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTATTN_LIST64 \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n\t}"                                \
      : FASTATTN_ACC64(c, d)                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add), "n"(kTransposed))
#define FASTATTN_REGISTERS64(type, c, add)                                             \
  asm volatile(                                                                        \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTATTN_LIST32 \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n\t}"                               \
      : FASTATTN_ACC32(c, d)                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add), "n"(kTransposed))

#define FASTATTN_SHARED64(type, c, add)                                                \
  asm volatile(                                                                        \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTATTN_LIST32 \
      "}, %32, %33, p, 1, 1, 0, 0;\n\t}"                                               \
      : FASTATTN_ACC32(c, d)                                                           \
      : "l"(a), "l"(b), "n"(add))
#define FASTATTN_REGISTERS256(type, c, add)                                              \
  asm volatile(                                                                          \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %133, 0;\n\t"                                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" FASTATTN_LIST128 \
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134;\n\t}"                           \
      : FASTATTN_ACC128(c, d)                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add), "n"(kTransposed))

// d (+)= a * b: 64 x 128, both operands in shared memory, K-major.
template <DType kType, bool kAdd>
__device__ __forceinline__ void MultiplyHalfShared(float (&d)[64], uint64_t a, uint64_t b) {
  static_assert(kType == DType::kBFloat16 || kType == DType::kFloat16);
  FASTATTN_FORMS(FASTATTN_SHARED128, kType == DType::kBFloat16, "bf16", "f16")
}

// 64 x 64.
template <DType kType, bool kAdd>
__device__ __forceinline__ void MultiplyHalfShared(float (&d)[32], uint64_t a, uint64_t b) {
  static_assert(kType == DType::kBFloat16 || kType == DType::kFloat16);
  FASTATTN_FORMS(FASTATTN_SHARED64, kType == DType::kBFloat16, "bf16", "f16")
}

// The same with a in registers. kTransposed: b is N-major (TransposedDescriptor).
template <DType kType, bool kAdd, int kTransposed>
__device__ __forceinline__ void MultiplyHalfRegisters(float (&d)[64], const uint32_t* a,
                                                      uint64_t b) {
  static_assert(kType == DType::kBFloat16 || kType == DType::kFloat16);
  FASTATTN_FORMS(FASTATTN_REGISTERS128, kType == DType::kBFloat16, "bf16", "f16")
}

template <DType kType, bool kAdd, int kTransposed>
__device__ __forceinline__ void MultiplyHalfRegisters(float (&d)[32], const uint32_t* a,
                                                      uint64_t b) {
  static_assert(kAdd && (kType == DType::kBFloat16 || kType == DType::kFloat16));
  if constexpr (kType == DType::kBFloat16) {
    FASTATTN_REGISTERS64("bf16", "+f", 1);
  } else {
    FASTATTN_REGISTERS64("f16", "+f", 1);
  }
}

template <DType kType, bool kAdd, int kTransposed>
__device__ __forceinline__ void MultiplyHalfRegisters(float (&d)[128], const uint32_t* a,
                                                      uint64_t b) {
  static_assert(kAdd && (kType == DType::kBFloat16 || kType == DType::kFloat16));
  if constexpr (kType == DType::kBFloat16) {
    FASTATTN_REGISTERS256("bf16", "+f", 1);
  } else {
    FASTATTN_REGISTERS256("f16", "+f", 1);
  }
}

// d += a * b of 64 x 8 results.
template <DType kType>
__device__ __forceinline__ void MultiplyHalfRegisters(float (&d)[4], const uint32_t* a,
                                                      uint64_t b) {
  if constexpr (kType == DType::kBFloat16) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " %8, 1, 1, 1, 0;"
        : FASTATTN_ACC4("+f", d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " %8, 1, 1, 1, 0;"
        : FASTATTN_ACC4("+f", d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

#undef FASTATTN_REGISTERS256
#undef FASTATTN_SHARED64
#undef FASTATTN_REGISTERS64
#undef FASTATTN_REGISTERS128
#undef FASTATTN_SHARED128

}  // namespace fastattn::cuda
