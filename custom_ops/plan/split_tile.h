// What the plan asks of the kernel that takes an attention call's split launches: the shapes of its
// tiles. One object for each such kernel, or for its variants that have other tiles.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fastattn {

// Kernels of attention over caches and contiguous keys.
enum class AttentionKernel : int { kMmaSm80, kWgmmaFp8, kWgmmaQ16 };

struct SplitTile {
  int (*keys)(int head_dim, int element_bytes);  // of a KV tile
  int (*rows)(
      int64_t packed_rows);  // of a work tile: the smallest that holds so many, or most_rows
  int most_rows;             // of a work tile
  int cluster_rows;          // of a work tile that clusters may take, at most
  int ctas_per_sm;           // that share a multiprocessor
};

// --- mma_sm80 ---

// CTAs that share a multiprocessor.
inline constexpr int kAttentionCtasPerSm = 2;

// Channels of a KV tile that a pipeline stage of mma_sm80 holds. Larger heads take several stages.
FASTATTN_HD constexpr int StageDim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim == 192 ? 64 : 128;
}

// Keys of a KV tile: a pipeline stage holds 8 KiB of them, `element_bytes` a channel.
FASTATTN_HD constexpr int KeysPerKvTile(int head_dim, int element_bytes) {
  return StageDim(head_dim) * element_bytes > 128 ? 32 : 64;
}

inline int TileRowsFor(int64_t packed_rows) {
  return packed_rows <= 8 ? 8 : packed_rows <= 16 ? 16 : 64;
}

inline constexpr SplitTile kMmaSm80Tile = {KeysPerKvTile, TileRowsFor, 64, 16, kAttentionCtasPerSm};

// The same where AttentionParams::IsGeneral(): it is compiled for tiles of 16 and 64 packed rows.
inline int GeneralTileRowsFor(int64_t packed_rows) { return packed_rows <= 16 ? 16 : 64; }

inline constexpr SplitTile kMmaSm80GeneralTile = {KeysPerKvTile, GeneralTileRowsFor, 64, 16,
                                                  kAttentionCtasPerSm};

}  // namespace fastattn
