// The matrix products over 4-bit K and V.
//
// E2M1: operands of K are values, and scores of a block are summed apart; those of V are values
// times a power of two of their block (mx_scales.cuh). int4 (which V may have alone): codes are
// stored as code + 8, and operands are (code + 8) times a power of two
// (Format<kInt4>::Widen). What the 8 adds is a multiple of a sum: of a query's channels, so that
// the accumulators of its scores begin with its negative; of a packed row's probabilities, which a
// tile more of O^T counts as a product of its own with a V of nothing but 8.
#pragma once

#include <cstdint>

#include "cuda/attention/mma_sm80/mx_scales.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/common/mma.cuh"

namespace fastattn::cuda {

// A lane's 4-bit codes of a key, or of two channels: 8 bytes or 16.
template <int kWords>
__device__ __forceinline__ void LoadNibbles(uint32_t address, uint32_t (&words)[kWords]) {
  static_assert(kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    const uint4 v = LoadShared16(address);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    const uint2 v = LoadShared8(address);
    words[0] = v.x, words[1] = v.y;
  }
}

// What the bias of K's codes adds to the scores of a packed row, -8 times the sum of its query, in
// the units of the product. `at(s)` are the words of the query in step s.
template <typename Traits, typename WordsOf>
__device__ __forceinline__ void FindQueryBias(WordsOf&& at, float (&bias)[2]) {
  using Format = typename Traits::Format;
  constexpr int kChains = 4;  // the first scores wait for the sum
  float sum[kChains][4] = {};
#pragma unroll
  for (int s = 0; s < Traits::kMmaSteps; ++s) {
    const uint2 b = at(s);
    Mma<Format::kOperand>(sum[s % kChains], Format::kLowBias, Format::kLowBias, Format::kHighBias,
                          Format::kHighBias, b.x, b.y);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) bias[c] = -(sum[0][c] + sum[1][c]) - (sum[2][c] + sum[3][c]);
}

// scores[m][n] += K Q^T for key tiles first .. first + kGroup.
template <typename Traits, typename Query>
__device__ __forceinline__ void MultiplyNibbles(
    uint32_t stage, const Query& query, int first,
    float (&scores)[Traits::kGroup][Traits::kTiles][4]) {
  static_assert(!Traits::kBlockScales, "MultiplyBlocks has K's scales");
  using Format = typename Traits::Format;
  constexpr int kWords = Traits::kNibbleWords;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // Of the keys KeyOf(0, g) and behind it that change places with each other.
  constexpr int kSwaps = Traits::kNibbleSwaps;
  uint32_t own[kSwaps];
#pragma unroll
  for (int i = 0; i < kSwaps; ++i) {
    own[i] = stage + Traits::NibbleRow(Traits::KeyOf(0, g) + i) * Traits::kRowBytes;
  }
#pragma unroll
  for (int part = 0; part < Traits::kNibbleParts; ++part) {
    const int piece = Traits::NibbleChunk(Traits::KeyOf(0, g), kWords * part);
    uint32_t keys[Traits::kGroup][2][kWords];
#pragma unroll
    for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int behind = Traits::KeyOf(m, 8 * half);  // `first` is even: it swaps nothing
        const int rows = Traits::KeyOf(first, 0) + behind - behind % kSwaps;
        LoadNibbles(own[behind % kSwaps] + rows * Traits::kRowBytes + piece * 16 + t * kWords * 4,
                    keys[m][half]);
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int step = 2 * (part * kWords + w);
      uint2 b[2][Traits::kTiles];
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
        b[0][n] = query.At(n, step), b[1][n] = query.At(n, step + 1);
      }
      uint32_t low[Traits::kGroup][4], high[Traits::kGroup][4];
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
        Format::Widen(keys[m][0][w], low[m]);
        Format::Widen(keys[m][1][w], high[m]);
      }
      // Products that follow each other add to other scores.
#pragma unroll
      for (int s = 0; s < 2; ++s) {
#pragma unroll
        for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
          for (int n = 0; n < Traits::kTiles; ++n) {
            Mma<Format::kOperand>(scores[m][n], low[m][2 * s], high[m][2 * s], low[m][2 * s + 1],
                                  high[m][2 * s + 1], b[s][n].x, b[s][n].y);
          }
        }
      }
    }
  }
}

// The same of keys with a scale for a block of 32 channels, the 16-byte pieces of a key: word t of
// a piece is lane t's, of eight keys and a piece at a time. `query` has its steps in that order.
template <typename Traits, typename Query>
__device__ __forceinline__ void MultiplyBlocks(uint32_t stage, const Query& query, int first,
                                               float (&scores)[Traits::kGroup][Traits::kTiles][4]) {
  using Format = typename Traits::Format;
  constexpr int kBlocks = Traits::kKeyBlocks;
  KeyScales<Traits> stored;
  stored.Load(stage, first);
  // More packed rows have no registers left for many of them.
  constexpr int kAtOnce = Traits::kTiles > 1 ? 1 : kBlocks > 4 ? 2 : kBlocks;
  float scales[kAtOnce][Traits::kGroup][2];
  if constexpr (kAtOnce == kBlocks) stored.Find(0, scales);
  const int lane = threadIdx.x % 32;
  // Lanes 8 j .. 8 j + 7 have the rows of key tile first + j / 2, of the half j % 2.
  const int key = Traits::KeyOf(first + lane / 16, lane % 8 + lane / 8 % 2 * 8);
  const uint32_t own = stage + Traits::NibbleRow(key) * Traits::kRowBytes;
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t keys[Traits::kGroup][2];
    const uint32_t piece = own + Traits::NibbleChunk(key, block) * 16;
#pragma unroll
    for (int m = 0; m < Traits::kGroup; m += 2) {
      const int row = Traits::NibbleRow(Traits::KeyOf(m, 0));
      const uint4 four = LoadMatrices(piece + row * Traits::kRowBytes);
      keys[m][0] = four.x, keys[m][1] = four.y, keys[m + 1][0] = four.z, keys[m + 1][1] = four.w;
    }
    uint32_t low[Traits::kGroup][4], high[Traits::kGroup][4];
#pragma unroll
    for (int m = 0; m < Traits::kGroup; ++m) {
      Format::Widen(keys[m][0], low[m]);
      Format::Widen(keys[m][1], high[m]);
    }
    if constexpr (kAtOnce < kBlocks) {
      if (block % kAtOnce == 0) stored.Find(block, scales);
    }
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
      float sums[Traits::kGroup][4] = {};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint2 b = query.At(n, 2 * block + s);
#pragma unroll
        for (int m = 0; m < Traits::kGroup; ++m) {
          Mma<Format::kOperand>(sums[m], low[m][2 * s], high[m][2 * s], low[m][2 * s + 1],
                                high[m][2 * s + 1], b.x, b.y);
        }
      }
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float scale = scales[block % kAtOnce][m][c / 2];
          scores[m][n][c] = __fmaf_rn(sums[m][c], scale, scores[m][n][c]);
        }
      }
    }
  }
}

// out += V^T P^T for key tiles first .. first + kGroup. A word of V, two channels of four tokens,
// is the whole operand of one of them.
template <typename Traits>
__device__ __forceinline__ void AccumulateNibbles(
    uint32_t stage, int first, const uint32_t (&p)[Traits::kGroup][Traits::kTiles][2],
    float (&out)[Traits::kOutTiles][Traits::kTiles][4]) {
  using Format = typename Traits::ValueFormat;
  constexpr DType kOperand = Format::kOperand;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t factors[Traits::kGroup];  // of the tokens of a word, for a block of channels
#pragma unroll
  for (int i = 0; i < Traits::kDimTiles; ++i) {
    uint32_t words[Traits::kGroup];
    LoadNibbles(stage + (8 * i + g) * kBlockSize + 16 * t + 4 * first, words);
    if constexpr (Traits::kBlockScales) {
      if (i % Traits::kBlockTiles == 0) {
        const int row = (i / Traits::kBlockTiles * 4 + t) * 16;
        LoadNibbles(stage + Traits::kDataBytes + Traits::kBlockFactors + row + 4 * first, factors);
      }
    }
#pragma unroll
    for (int m = 0; m < Traits::kGroup; ++m) {
      uint32_t a[4];
      if constexpr (Traits::kBlockScales) {
        Format::Widen(words[m], __byte_perm(factors[m], 0, 0x1404),
                      __byte_perm(factors[m], 0, 0x3424), a);
      } else {
        Format::Widen(words[m], a);
      }
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
        Mma<kOperand>(out[i][n], a[0], a[1], a[2], a[3], p[m][n][0], p[m][n][1]);
      }
    }
  }
  if constexpr (Traits::kValueBiased) {
#pragma unroll
    for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
        Mma<kOperand>(out[Traits::kDimTiles][n], Format::kLowBias, Format::kHighBias,
                      Format::kLowBias, Format::kHighBias, p[m][n][0], p[m][n][1]);
      }
    }
  }
}

// Takes the bias off the outputs of a segment, and the units of its products: the odd channels,
// rows 8 .. 15 of a tile, lie higher in their bytes and count 2^4 as much.
template <typename Traits>
__device__ __forceinline__ void DropBias(float (&out)[Traits::kOutTiles][Traits::kTiles][4]) {
  constexpr float kInverse = 1.0f / Traits::ValueFormat::kUnit;
#pragma unroll
  for (int i = 0; i < Traits::kDimTiles; ++i) {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float inverse = c < 2 ? kInverse : kInverse / 16;
        out[i][n][c] = (out[i][n][c] - out[Traits::kDimTiles][n][c]) * inverse;
      }
    }
  }
}

}  // namespace fastattn::cuda
