// Shared memory of the Hopper kernel, its barriers, and what its roles agree on.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/divisor.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/mla/attention/schedule.cuh"
#include "cuda/mla/attention/token.cuh"

namespace fastattn::cuda::mla_attention {

inline constexpr int kTileRows = kMlaAttentionWgmmaRows;
inline constexpr int kStages = 2;
inline constexpr int kPieceBytes = kTileKeys * 128;  // 64 channels of a tile's keys
inline constexpr int kHalfPieces = 4;                // of values: 256 channels
// Named barriers of the consumers.
inline constexpr int kBothBarrier = 1, kLeftBarrier = 2;

struct Arguments {
  MlaAttentionParams p;
  MlaAttentionPlan plan;
  Divisor page_size;
  int box_rows;      // TMA: tokens of a box
  CUtensorMap keys;  // kBf16
};

// Whether bf16 tiles are taken in pairs (wgmma_pairs.cuh) where products take longer than the
// memory.
inline constexpr bool kPairs = true;

// kInPairs: by the consumers of wgmma_pairs.cuh.
template <MlaFormat kFormat, bool kInPairs>
struct Config {
  static constexpr MlaFormat kCache = kFormat;
  static constexpr bool kTakesPairs = kInPairs;
  static constexpr bool kTma = kFormat == MlaFormat::kBf16;
  static constexpr int kChannels = kDim<kFormat>;
  static constexpr int kPieces = kChannels / 64;
  // Codes are dequantised by two warpgroups.
  static constexpr int kProducerThreads = kTma ? 128 : 256;
  static constexpr int kThreads = kProducerThreads + 256;
  // Together at most what the kernel is launched with. More would never be given.
  static constexpr int kLaunched = kTma ? 168 : 128;
  static constexpr int kProducerRegisters = kTma ? 40 : 72;
  static constexpr int kLeftRegisters = kTakesPairs ? 232 : kTma ? 240 : 208;
  static constexpr int kRightRegisters = kTakesPairs ? 232 : kTma ? 224 : 160;
  static_assert(!kTakesPairs || kPieces == 2 * kHalfPieces + 1);  // a piece that is no value
  static_assert(kProducerRegisters * (kProducerThreads / 128) + kLeftRegisters + kRightRegisters <=
                kLaunched * (kThreads / 128));
  // Arrivals at the barriers of a tile that is there.
  static constexpr int kFullArrivals = kTma ? 1 : kProducerThreads / 32 * kWarpArrivals;
};

// A tile of keys: pieces of 64 channels, in each a row of 128 bytes for every key, swizzled. They
// are the right operand of the scores, K-major, and the first eight that of the output, N-major.
template <class C>
struct Shared {
  uint8_t q[C::kPieces * kPieceBytes];
  uint8_t keys[kStages][C::kPieces * kPieceBytes];
  uint8_t
      weights[C::kTakesPairs ? 1024 : kTileRows * 128];  // with pairs in the last piece of the keys
  // Of a tile's rows: the factor of the output so far, and (pairs) the new maximum. Without pairs
  // the first entry is that of every tile.
  float keep[kStages][kTileRows];
  float maximum[C::kTakesPairs ? kStages : 1][kTileRows];
  float sum[C::kTakesPairs ? kTileRows : 1];  // of the right consumer's tiles
  float factor[kTileRows];                    // of the output at last
  uint64_t assigned[kStages];                 // a bit a key
  // Pieces 4 to 7, and the others.
  uint64_t right_full[kStages], right_empty[kStages];
  uint64_t left_full[kStages], left_empty[kStages];
  uint64_t weights_full[kStages], weights_empty;
  int64_t sums[C::kThreads / 32];
  Share share;
};

// Address of 16 bytes of a row of 128, swizzled.
__device__ __forceinline__ uint32_t Swizzled(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// A CTA's part of a segment.
struct Part {
  int row0;        // first of its rows, in the sequence
  int rows;        // of the sequence
  int begin, end;  // key tiles
  int least;       // keys that its first row sees
  bool whole;      // all tiles of the item
  bool continued;  // an earlier group has the first tiles
  bool none;       // there is nothing to do

  __device__ __forceinline__ Part(const Arguments& args, const Segment& segment) {
    const Seq& seq = segment.seq;
    row0 = static_cast<int>(segment.row) + blockIdx.x % args.plan.group_ctas * kTileRows;
    rows = seq.q_len * args.p.heads;
    begin = segment.begin;
    end = 0;
    least = 0;
    whole = segment.begin == 0 && segment.end == segment.tiles;
    continued = segment.begin > 0;
    none = row0 >= rows;
    if (none) return;
    end = min(segment.end, TilesBefore(args.p, seq, row0 + kTileRows));
    least = VisibleKeys(args.p, seq, row0 / args.p.heads);
  }
};

// Number of a tile since the kernel's start, and where it lies.
struct TileCount {
  uint32_t count = 0;
  __device__ __forceinline__ int stage() const { return count % kStages; }
  __device__ __forceinline__ uint32_t phase() const { return count / kStages & 1; }
};

}  // namespace fastattn::cuda::mla_attention
