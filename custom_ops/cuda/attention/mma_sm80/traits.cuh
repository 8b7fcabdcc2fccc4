// Shapes of one attention kernel.
//
// A CTA of 4 warps works on a tile of `kColumns` (query token, query head) pairs of one KV head.
// Its warps form streams: each stream takes every kStreams-th unit of 64 (or 32) keys, moves it
// through its own ring of shared memory, and keeps its own maximum, sum and output, merged at the
// end of the item. No stream waits for another one before that.
//
// Keys are the rows of the matrix products and queries their columns: S^T = K Q^T and
// O^T = V^T P^T, so that 8 pairs fill a tensor-core tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/types.h"
#include "cuda/attention/shared/format.cuh"
#include "heuristics/attention_plan.h"

namespace fastattn::cuda {

inline constexpr int kAttentionThreads = 128;

// Whether code compiled for this architecture (its number, 89 for 8.9) has the shorter rings, for
// GPUs with 99 KiB of shared memory for a CTA. The other ones have 163 KiB or more.
FASTATTN_HD constexpr bool HasShortRings(int arch) {
  return arch == 86 || arch == 89 || arch / 10 == 12;
}

#if defined(FASTATTN_SHORT_RINGS)  // to try them on any GPU
inline constexpr bool kShortRings = true;
#elif defined(__CUDA_ARCH__)
inline constexpr bool kShortRings = HasShortRings(__CUDA_ARCH__ / 10);
#else
inline constexpr bool kShortRings = false;
#endif

template <DType kElement_, int kHeadDim_, bool kPaged_, bool kTokenScales_, int kColumns_>
struct AttentionTraits {
  static constexpr DType kElement = kElement_;
  using Format = fastattn::cuda::Format<kElement>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPaged = kPaged_;
  static constexpr bool kTokenScales = kTokenScales_;  // one scale a token and KV head
  static constexpr int kColumns = kColumns_;

  static constexpr int kStreamWarps = kColumns == 64 ? 2 : 1;
  static constexpr int kStreamThreads = 32 * kStreamWarps;
  static constexpr int kStreams = kAttentionThreads / kStreamThreads;
  static constexpr int kTiles = kColumns / 8 / kStreamWarps;  // 8-column tiles of a warp

  static constexpr bool kCodes = Format::kBytes == 1;
  static constexpr bool kTransposedV = kCodes && kPaged;       // V [D, 64] in TokenSlot order
  static constexpr int kRowBytes = kHeadDim * Format::kBytes;  // of a key
  static constexpr int kUnit = KeysPerKvTile(kRowBytes);
  static constexpr int kKeyTiles = kUnit / 16;
  // Key tiles whose scores are in registers at the same time.
  static constexpr int kGroup = kTiles >= 4 ? 2 : kKeyTiles;
  static constexpr int kDimTiles = kHeadDim / 16;
  static constexpr int kSteps = kHeadDim / 16;  // of the product over channels
  static constexpr bool kQueryInRegisters = kTiles <= 2;

  // A slot of the ring is a unit's K or V, its tokens' scales and the unit's state.
  static constexpr int kDataBytes = kUnit * kRowBytes;
  static constexpr int kScaleBytes = kTokenScales ? kUnit * 4 : 0;
  static constexpr int kSlotBytes = kDataBytes + kScaleBytes + 16;
  // With few columns a step of the ring is a K or a V, and starts the load that lies kSlots - 1
  // ahead. With many, scores of only kGroup key tiles fit in registers at a time: a step is a K and
  // its V, and the streams take their steps together.
  static constexpr bool kPairs = kStreamWarps > 1;
  static constexpr bool kClusters = !kPairs;  // the kernel can run in clusters of CTAs
  static constexpr int kLongRing = kPairs ? 4 : kDataBytes * kStreams <= 16384 ? 5 : 3;
  static constexpr int kShortRing = kPairs ? 4 : 2;
  static constexpr int kSlots = kShortRings ? kShortRing : kLongRing;

  // Outputs of all streams are merged this many channels at a time.
  static constexpr int kMergeDims = std::min(2048 / (kStreams * kColumns), kHeadDim);
  static constexpr int kMergeStride = kMergeDims + 4;  // floats; keeps banks apart

  static constexpr int kQueryBytes = kColumns * kHeadDim * 2;
  static constexpr int kMergeBytes = kStreams * kColumns * kMergeStride * 4;
  // The merge begins when all warps have used an item's queries.
  static constexpr int kMergeOffset = kStreams * kSlots * kSlotBytes;
  static constexpr int kQueryOffset = kMergeOffset;
  static constexpr int kStateOffset = kMergeOffset + std::max(kMergeBytes, kQueryBytes);
  static constexpr int kStateBytes = kStreams * kColumns * 8;  // maximum, sum
  static constexpr int kColumnOffset = kStateOffset + kStateBytes;
  static constexpr int kColumnBytes = kColumns * 32;  // ColumnInfo
  static constexpr int kScanOffset = kColumnOffset + kColumnBytes;
  static constexpr int kScanBytes = 32;
  static constexpr int kMaxSegments = 12;
  static constexpr int kSegmentOffset = kScanOffset + kScanBytes;
  static constexpr int kSegmentBytes = kMaxSegments * 80;
  static constexpr int kScheduleOffset = kSegmentOffset + kSegmentBytes;
  // Of a kernel with rings of `slots`: the host does not know which one was compiled.
  static constexpr int SharedBytes(int rows, int slots) {
    return kScheduleOffset + kStreams * (slots - kSlots) * kSlotBytes + 8 * (rows + 1);
  }

  static_assert(kMergeDims % 16 == 0 && kSlotBytes % 16 == 0);

  // 16-byte piece in which a row's piece `chunk` lies: no 8 lanes of a load meet in a bank.
  static __device__ __forceinline__ int Swizzle(int row, int chunk) {
    return kRowBytes / 16 >= 8 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3);
  }

  // Key of a unit that is row `r` (0..15) of key tile m in S^T. For V in TokenSlot order, the
  // tokens of a thread's 16-byte pieces of V are then the rows that it holds of S.
  static __device__ __forceinline__ int KeyOf(int m, int r) {
    if constexpr (kTransposedV) {
      return 16 * ((r & 7) >> 1) + 2 * m + (r & 1) + (r & 8);
    } else {
      return 16 * m + r;
    }
  }

  // Channel of row r (0..15) of channel tile i in O^T.
  static __device__ __forceinline__ int ChannelOf(int i, int r) {
    if constexpr (kCodes && !kTransposedV) {
      return 16 * i + 2 * (r & 7) + (r >> 3);
    } else {
      return 16 * i + r;
    }
  }

  // Lane % 4 = t holds 4 neighbouring channels of step s of the product over channels, in places
  // 2t, 2t + 1, 2t + 8, 2t + 9. A lane so reads K in whole 16-byte pieces, ChunkOf(t, j).
  static constexpr int kStepsPerChunk = kCodes ? 4 : 2;
  static constexpr int kChunks = kSteps / kStepsPerChunk;  // 16-byte pieces of a lane and row

  static __device__ __forceinline__ int ChunkOf(int t, int j) {
    return kRowBytes / 16 >= 8 ? 2 * t + (j & 1) + 8 * (j >> 1) : t;
  }
  // Where a step's four channels from 4 * quad on are: {t, s}.
  static __device__ __forceinline__ int2 StepOf(int quad) {
    const int chunk = quad / kStepsPerChunk, step = quad % kStepsPerChunk;
    if (kRowBytes / 16 >= 8) {
      const int j = (chunk & 1) + 2 * (chunk >> 3);
      return make_int2((chunk >> 1) & 3, j * kStepsPerChunk + step);
    }
    return make_int2(chunk, step);
  }
};

}  // namespace fastattn::cuda
