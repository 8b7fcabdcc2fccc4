// Products of a tile's keys and the queries' columns: accumulators of 64 keys x 64 or 128 columns.
#pragma once

#include "cuda/common/wgmma.cuh"

namespace fastattn::cuda::mqa_logits {

template <bool kAdd>
__device__ __forceinline__ void SharedProduct(float (&d)[64], uint64_t a, uint64_t b) {
  MultiplyShared<kAdd>(d, a, b);
}

#define FASTATTN_SHARED64(right, c, add)                                            \
  asm volatile(                                                                     \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"                            \
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3." right " {" FASTATTN_LIST32 \
      "}, %32, %33, p, 1, 1;\n\t}"                                                  \
      : FASTATTN_ACC32(c, d)                                                        \
      : "l"(a), "l"(b), "n"(add))

template <bool kAdd>
__device__ __forceinline__ void SharedProduct(float (&d)[32], uint64_t a, uint64_t b){
    FASTATTN_FORMS(FASTATTN_SHARED64, true, "e4m3", "e4m3")}
#undef FASTATTN_SHARED64

#define FASTATTN_SHARED256(right, c, add)                                             \
  asm volatile(                                                                       \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %130, 0;\n\t"                             \
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3." right " {" FASTATTN_LIST128 \
      "}, %128, %129, p, 1, 1;\n\t}"                                                  \
      : FASTATTN_ACC128(c, d)                                                         \
      : "l"(a), "l"(b), "n"(add))

template <bool kAdd>
__device__ __forceinline__ void SharedProduct(float (&d)[128], uint64_t a, uint64_t b) {
  FASTATTN_FORMS(FASTATTN_SHARED256, true, "e4m3", "e4m3")
}

#undef FASTATTN_SHARED256

// d = keys * columns, both in shared memory, rows of 128 bytes.
template <int kRegisters>
__device__ __forceinline__ void MultiplyTile(float (&d)[kRegisters], uint64_t keys,
                                             uint64_t columns) {
  SharedProduct<false>(d, keys, columns);
#pragma unroll
  for (int step = 1; step < 4; ++step) {
    SharedProduct<true>(d, keys + 2 * step, columns + 2 * step);
  }
  CommitProducts();
}

// The same with the keys in registers, four a step of 32 channels.
template <int kRegisters>
__device__ __forceinline__ void MultiplyTile(float (&d)[kRegisters], const uint32_t (&keys)[16],
                                             uint64_t columns) {
  MultiplyRegisters<false>(d, keys, columns);
#pragma unroll
  for (int step = 1; step < 4; ++step) {
    MultiplyRegisters<true>(d, keys + 4 * step, columns + 2 * step);
  }
  CommitProducts();
}

}  // namespace fastattn::cuda::mqa_logits
