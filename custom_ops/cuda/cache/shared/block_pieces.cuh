// A cache block of one head as 16-byte pieces, and the transposition of V between pieces of one
// channel and a token-major copy in shared memory.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/common/bytes.cuh"

namespace fastattn::cuda {

// Byte offset of the K piece with channels [16 g, 16 g + 16) of token r.
template <CacheLayout kLayout, int kHeadDim>
__device__ __forceinline__ int KeyPiece(int r, int g) {
  if constexpr (kLayout == CacheLayout::kFastDeploy) {
    const int row = (r & ~15) + (r & 7) + (g & 1) * 8;
    return row * kHeadDim + (g >> 1) * 32 + ((r >> 3) & 1) * 16;
  } else {
    return r * kHeadDim + g * 16;
  }
}

// Byte offset of the V piece with tokens [16 g, 16 g + 16) of channel d, in the order of TokenSlot
// (common/layout.h).
template <CacheLayout kLayout, int kHeadDim>
__device__ __forceinline__ int ValuePiece(int d, int g) {
  static_assert(kLayout != CacheLayout::kLogical, "logical V has no pieces of one channel");
  if constexpr (kLayout == CacheLayout::kFastDeploy) {
    const int row = (d & ~15) + (d & 7) + (g & 1) * 8;
    return row * kBlockSize + (g >> 1) * 32 + ((d >> 3) & 1) * 16;
  } else {
    return d * kBlockSize + g * 16;
  }
}

// The i-th K piece of this thread. A warp takes tokens r and r + 8 together, as their pieces share
// a 32-byte sector in the fastdeploy layout.
struct PieceOfThread {
  int token, group;
};

template <int kHeadDim, int kThreads>
__device__ __forceinline__ PieceOfThread KeyPieceOfThread(int i) {
  constexpr int kPiecesPerToken = kHeadDim / 16;
  static_assert(kThreads % kPiecesPerToken == 0, "threads without a token of their own");
  const int t = static_cast<int>(threadIdx.x) / kPiecesPerToken + i * (kThreads / kPiecesPerToken);
  return {(t & ~15) + ((t & 15) >> 1) + (t & 1) * 8,
          static_cast<int>(threadIdx.x) % kPiecesPerToken};
}

// V codes of a block as token rows of D bytes, padded by 32 bytes after every 16 rows. When a warp
// reads or writes words of 4 channels of 4 token groups x 8 channel quads, the padding puts them
// into 4 x 8 different banks.
template <int kHeadDim>
struct TokenMajorTile {
  static constexpr int kGroupPad = 32;
  alignas(16) uint8_t codes[kBlockSize * kHeadDim + 4 * kGroupPad];

  static __device__ __forceinline__ int Offset(int token) {
    return token * kHeadDim + (token / 16) * kGroupPad;
  }
};

// Token of byte j in word w of a V piece: the word holds tokens 2w, 2w+1, 2w+8, 2w+9 of its group.
__device__ __forceinline__ int TokenOfWord(int w, int j) { return 2 * w + (j & 1) + (j >> 1) * 8; }

// Writes the pieces of channels [channel, +4), tokens [16 group, +16), token-major.
template <int kHeadDim>
__device__ __forceinline__ void ScatterPieces(const uint4 (&pieces)[4], int channel, int group,
                                              TokenMajorTile<kHeadDim>& tile) {
  const uint32_t words[4][4] = {{pieces[0].x, pieces[1].x, pieces[2].x, pieces[3].x},
                                {pieces[0].y, pieces[1].y, pieces[2].y, pieces[3].y},
                                {pieces[0].z, pieces[1].z, pieces[2].z, pieces[3].z},
                                {pieces[0].w, pieces[1].w, pieces[2].w, pieces[3].w}};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t by_token[4];
    TransposeBytes(words[w], by_token);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<uint32_t*>(tile.codes + tile.Offset(16 * group + TokenOfWord(w, j)) +
                                   channel) = by_token[j];
    }
  }
}

// Reads what ScatterPieces wrote.
template <int kHeadDim>
__device__ __forceinline__ void GatherPieces(const TokenMajorTile<kHeadDim>& tile, int channel,
                                             int group, uint4 (&pieces)[4]) {
  uint32_t words[4][4];  // [w][channel]
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t by_token[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      by_token[j] = *reinterpret_cast<const uint32_t*>(
          tile.codes + tile.Offset(16 * group + TokenOfWord(w, j)) + channel);
    }
    TransposeBytes(by_token, words[w]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pieces[i] = make_uint4(words[0][i], words[1][i], words[2][i], words[3][i]);
  }
}

}  // namespace fastattn::cuda
