// Scales of E2M1 codes: a UE8M0 byte for 32 channels of a token.
//
// K: a step of the product over channels lies in one block, whose scores are summed apart and then
// multiplied with the scales, which become fp32 numbers (KeyScales).
//
// V: a token's largest block has the token's scale, which is used as that of any other type is.
// What its other blocks are smaller by, 2^-delta, goes into the operands: exactly, as long as a
// value is a multiple of fp16's smallest number, that is down to blocks 2^-23 of the largest.
// Smaller ones count as 0, as they would beside the largest in a sum of fp32.
//
// A stage gets the bytes as they lie in the cache. The warps that compute on it make of V's, ahead
// of the first product, the tokens' scales (bf16, at the place of other types' scales) and a byte
// for each block: the upper one of an fp16 number, 2^14 times 2^-delta, for operands that are 2^-14
// of their values (Format<kE2M1>).
#pragma once

#include <cstdint>

#include "common/fp4.h"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/common/mma.cuh"

namespace fastattn::cuda {

// The factors' bytes of up to four blocks whose UE8M0 bytes are `bytes`; `largest`: the token's.
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

// A token's bytes, four in a word, of which the last may have fewer.
template <int kBlocks>
struct TokenBytes {
  static constexpr int kWords = (kBlocks + 3) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void Load(uint32_t from) {
    if constexpr (kBlocks == 8) {
      const uint2 pair = LoadShared8(from);
      words[0] = pair.x, words[1] = pair.y;
    } else if constexpr (kBlocks == 4) {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(from) : "memory");
    } else if constexpr (kBlocks == 2) {
      uint16_t pair;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(pair) : "r"(from) : "memory");
      words[0] = pair;
    } else {
      static_assert(kBlocks == 3);
      words[0] = 0;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t byte;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(from + b) : "memory");
        words[0] |= byte << (8 * b);
      }
    }
  }

  __device__ __forceinline__ int At(int block) const {
    return static_cast<int>(words[block / 4] >> (8 * (block % 4)) & 0xFF);
  }
};

// The scales of a stage of V. The threads of the pipeline share the tokens, and must meet before
// they use them; `meet()` lets them meet where factors take the place of bytes.
template <typename Traits, typename Meet>
__device__ __forceinline__ void PrepareValueScales(uint32_t stage, Meet&& meet) {
  constexpr int kBlocks = Traits::kValueBlocks, kThreads = Traits::kPipelineThreads;
  constexpr int kTokens = Traits::kKvTile / kThreads;  // of a thread; 0: half of them have one
  constexpr int kRounds = kTokens > 0 ? kTokens : 1;
  const uint32_t scales = stage + Traits::kDataBytes, factors = scales + Traits::kBlockFactors;
  TokenBytes<kBlocks> stored[Traits::kFactorsInPlace ? kRounds : 1];
  if constexpr (Traits::kFactorsInPlace) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int token = threadIdx.x % kThreads + i * kThreads;
      if (kTokens > 0 || token < Traits::kKvTile) {
        stored[i].Load(scales + Traits::kRawScales + token * kBlocks);
      }
    }
    meet();
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int token = threadIdx.x % kThreads + i * kThreads;
    if (kTokens == 0 && token >= Traits::kKvTile) break;
    TokenBytes<kBlocks>& bytes = stored[Traits::kFactorsInPlace ? i : 0];
    if constexpr (!Traits::kFactorsInPlace) {
      bytes.Load(scales + Traits::kRawScales + token * kBlocks);
    }
    int largest = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) largest = max(largest, bytes.At(b));
    // As a bf16 number: 0 is subnormal, and 255 a NaN.
    const int scale = largest == 0 ? 0x0040 : largest == kUE8M0NaN ? 0x7FC0 : largest << 7;
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(scales + token * 2),
                 "h"(static_cast<uint16_t>(scale))
                 : "memory");
    // For each block the tokens in the order of V's words, whose bytes 0 and 2 make a pair, and 1
    // and 3: here they are neighbours.
    const int r = token % 16;
    const int place = token / 16 * 16 + (r & 7) / 2 * 4 + (r & 1) * 2 + r / 8;
#pragma unroll
    for (int w = 0; w < TokenBytes<kBlocks>::kWords; ++w) {
      constexpr int kInWord = kBlocks < 4 ? kBlocks : 4;
      const uint32_t found = FactorBytes<kInWord>(bytes.words[w], largest);
#pragma unroll
      for (int b = 0; b < kInWord; ++b) {
        asm volatile("st.shared.u8 [%0], %1;" ::"r"(factors + (4 * w + b) * kBlockSize + place),
                     "r"(found >> (8 * b))
                     : "memory");
      }
    }
  }
}

// The same of a pipeline of one warp.
template <typename Traits>
__device__ __forceinline__ void PrepareForWarp(uint32_t stage) {
  if constexpr (Traits::kBlockScales) {
    static_assert(Traits::kPipelineWarps == 1 || Traits::kPairsKv);
    PrepareValueScales<Traits>(stage, [] {});
    __syncwarp();
  }
}

// Whether the byte 0 or 255 is among those of `bytes`.
__device__ __forceinline__ uint32_t HasOddScales(uint32_t bytes) {
  const uint32_t next = bytes + 0x01010101u;  // 0 or 1 for these
  return ((next & 0xFEFEFEFEu) - 0x01010101u) & ~next & 0x80808080u;
}

// Scales of K's blocks for a lane's keys, those of key tiles first .. first + kGroup, which lie
// side by side.
template <typename Traits>
struct KeyScales {
  static constexpr int kBlocks = Traits::kKeyBlocks;
  static constexpr int kWords = Traits::kGroup * 2 * kBlocks / 4;
  // With one column tile they are looked at first: 0 and 255 are rare.
  static constexpr bool kLooks = Traits::kTiles == 1;
  uint32_t words[kWords];  // as they are stored
  bool odd = false;        // 0 or 255 is among those of the KV tile

  __device__ __forceinline__ void Load(uint32_t stage, int first) {
    static_assert(Traits::KeyOf(1, 0) == 2 && Traits::KeyOf(0, 8) == 1);
    const int lane = threadIdx.x % 32;
    const uint32_t raw = stage + Traits::kDataBytes + Traits::kRawScales;
    const uint32_t own = raw + Traits::KeyOf(first, lane / 4) * kBlocks;
    if constexpr (kWords % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = LoadShared16(own + 4 * i);
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    } else if constexpr (kWords % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kWords; i += 2) {
        const uint2 pair = LoadShared8(own + 4 * i);
        words[i] = pair.x, words[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[i]) : "r"(own + 4 * i));
      }
    }
    if constexpr (kLooks) {
      // Each lane looks at some keys of the KV tile.
      uint32_t found;
      if constexpr (kBlocks > 4) {
        const uint4 four = LoadShared16(raw + min(lane, 4 * kBlocks - 1) * 16);
        found = HasOddScales(four.x) | HasOddScales(four.y) | HasOddScales(four.z) |
                HasOddScales(four.w);
      } else if constexpr (kBlocks > 2) {
        const uint2 pair = LoadShared8(raw + min(lane, 8 * kBlocks - 1) * 8);
        found = HasOddScales(pair.x) | HasOddScales(pair.y);
      } else {
        uint32_t word;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(raw + lane * 4));
        found = HasOddScales(word);
      }
      odd = __any_sync(0xFFFFFFFFu, found != 0);
    }
  }

  // Those of kCount blocks as numbers, [block][m][half]. A byte at an exponent's place is its
  // value, but for 0 and 255.
  template <int kCount>
  __device__ __forceinline__ void Find(int block, float (&scale)[kCount][Traits::kGroup][2]) const {
#pragma unroll
    for (int i = 0; i < kCount * Traits::kGroup * 2; ++i) {
      const int key = i % (Traits::kGroup * 2), of = i / (Traits::kGroup * 2);
      const int byte = key * kBlocks + block + of;
      const uint32_t word = words[byte / 4];
      const uint32_t bits = byte % 4 == 3 ? word >> 1 : word << (23 - 8 * (byte % 4));
      scale[of][key / 2][key % 2] = __uint_as_float(bits & 0x7F800000u);
    }
    if constexpr (!kLooks) {
#pragma unroll
      for (int i = 0; i < kCount * Traits::kGroup * 2; ++i) {
        const int key = i % (Traits::kGroup * 2), of = i / (Traits::kGroup * 2);
        float& x = scale[of][key / 2][key % 2];
        x = __uint_as_float(max(__float_as_uint(x), 0x00400000u));
        x = __fmaf_rn(x, 0.0f, x);  // NaN of infinity
      }
    } else if (odd) {
#pragma unroll
      for (int i = 0; i < kCount * Traits::kGroup * 2; ++i) {
        const int key = i % (Traits::kGroup * 2), of = i / (Traits::kGroup * 2);
        float& x = scale[of][key / 2][key % 2];
        const uint32_t bits = __float_as_uint(x);
        x = __uint_as_float(bits == 0 ? 0x00400000u : bits == 0x7F800000u ? 0x7FC00000u : bits);
      }
    }
  }
};

}  // namespace fastattn::cuda
