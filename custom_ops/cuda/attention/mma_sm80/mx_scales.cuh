// Scales of E2M1 codes: a UE8M0 byte for 32 channels of a token.
//
// A token's largest block has the token's scale, which is used as that of any other type is. What
// its other blocks are smaller by, 2^-delta, goes into the operands: exactly, as long as a value is
// a multiple of fp16's smallest number, that is down to blocks 2^-23 of the largest. Smaller ones
// count as 0, as they would beside the largest in a sum of fp32.
//
// A stage gets the bytes as they lie in the cache. The warps that compute on it make of them, ahead
// of the first product, the tokens' scales (bf16, at the place of other types' scales) and a byte
// for each block: the upper one of an fp16 number, 2^14 times 2^-delta, for operands that are 2^-14
// of their values (Format<kE2M1>).
#pragma once

#include <cstdint>

#include "common/fp4.h"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/common/mma.cuh"

namespace fastattn::cuda {

// The factors' bytes of the blocks whose UE8M0 bytes are `bytes`, of which `largest` is one.
template <int kBlocks>
__device__ __forceinline__ uint32_t FactorBytes(uint32_t bytes, int largest) {
  uint32_t factors = 0;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int byte = static_cast<int>(bytes >> (8 * i) & 0xFF);
    factors |= static_cast<uint32_t>(max(29 + byte - largest, 1)) << (8 * i + 2);
  }
  return factors;
}

// The scales of a stage of K (kKeys) or of V. The threads of the pipeline share the tokens, and
// must meet before they use them.
template <typename Traits, bool kKeys>
__device__ __forceinline__ void PrepareBlockScales(uint32_t stage) {
  constexpr int kBlocks = Traits::kTokenScales;
  static_assert(kBlocks == 2 || kBlocks == 4);
  const uint32_t scales = stage + Traits::kDataBytes, factors = scales + Traits::kBlockFactors;
#pragma unroll
  for (int i = 0; i < Traits::kKvTile / Traits::kPipelineThreads; ++i) {
    const int token = threadIdx.x % Traits::kPipelineThreads + i * Traits::kPipelineThreads;
    const uint32_t raw = scales + Traits::kRawScales + token * kBlocks;
    uint32_t bytes;
    if constexpr (kBlocks == 4) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bytes) : "r"(raw) : "memory");
    } else {
      uint16_t pair;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(pair) : "r"(raw) : "memory");
      bytes = pair;
    }
    int largest = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      largest = max(largest, static_cast<int>(bytes >> (8 * b) & 0xFF));
    }
    // As a bf16 number: 0 is subnormal, and 255 a NaN.
    const int scale = largest == 0 ? 0x0040 : largest == kUE8M0NaN ? 0x7FC0 : largest << 7;
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(scales + token * 2),
                 "h"(static_cast<uint16_t>(scale))
                 : "memory");
    const uint32_t found = FactorBytes<kBlocks>(bytes, largest);
    if constexpr (kKeys) {
      const uint32_t to = factors + Traits::NibbleRow(token) * kBlocks;
      if constexpr (kBlocks == 4) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(found) : "memory");
      } else {
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(static_cast<uint16_t>(found))
                     : "memory");
      }
    } else {
      // For each block the tokens in the order of V's words, whose bytes 0 and 2 make a pair, and 1
      // and 3: here they are neighbours.
      const int r = token % 16;
      const int place = token / 16 * 16 + (r & 7) / 2 * 4 + (r & 1) * 2 + r / 8;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        asm volatile("st.shared.u8 [%0], %1;" ::"r"(factors + b * kBlockSize + place),
                     "r"(found >> (8 * b))
                     : "memory");
      }
    }
  }
}

// The same of a pipeline of one warp, if its block is assigned.
template <typename Traits, bool kKeys>
__device__ __forceinline__ void PrepareForWarp(uint32_t stage, bool assigned) {
  if constexpr (Traits::kBlockScales) {
    static_assert(Traits::kPipelineWarps == 1 || Traits::kPairsKv);
    if (assigned) PrepareBlockScales<Traits, kKeys>(stage);
    __syncwarp();
  }
}

// Factors of a key's channels of a block, as a pair of fp16 numbers.
template <typename Traits>
__device__ __forceinline__ uint32_t KeyFactors(uint32_t stage, int key, int block) {
  uint32_t byte;
  asm volatile("ld.shared.u8 %0, [%1];"
               : "=r"(byte)
               : "r"(stage + Traits::kDataBytes + Traits::kBlockFactors +
                     Traits::NibbleRow(key) * Traits::kTokenScales + block));
  return __byte_perm(byte, 0, 0x0404);
}

}  // namespace fastattn::cuda
