// A work tile: queries of one sequence and head, and the KV tiles that they attend to.
#pragma once

#include "common/types.h"

namespace fastattn::cuda::wgmma_sm90 {

// Channels of a head, or of its values, in shared memory.
__host__ __device__ constexpr int PaddedDim(int head_dim) {
  return head_dim == 96 ? 128 : head_dim;
}

// Found by a producer warp; lies in shared memory.
struct WorkTile {
  int batch_idx;
  int head;
  int kv_head;
  int token;           // in q: the first query
  int queries;         // that exist
  int position;        // of the first query among the sequence's keys
  int k_len;           // keys of the sequence, paged ones as far as the block table reaches
  int ragged_token;    // ragged K and V: the sequence's first key
  int ragged_block;    // ragged K and V: the sequence's first block of transposed values
  int kv_tiles;        // at least 1; -1: there are no more work tiles
  int last_kv_tile;    // the mainloop begins with it, and goes on downwards
  int unmasked_begin;  // keys that every query of the tile sees
  int unmasked_end;
};

// Flags of a KV tile, which is two cache blocks, or one.
inline constexpr int kUnassigned = 1;  // << 0, 1: the block is not assigned, its keys are masked
inline constexpr int kNeedsScrub = 4;  // some query sees only a part of the KV tile
inline constexpr int kAfterScrub = 8;  // the KV tile of the iteration before needed it

// A sequence with queries for this kernel.
struct ActiveSeq {
  int batch_idx;
  int q_begin;  // its first token in q
  int q_len;
  int k_len;
};

inline constexpr int kMaxActiveSeqs = 256;

// How far a CTA has come in the order of work tiles (see TileScheduler).
struct SchedulerState {
  int round;
  int count;     // active sequences listed
  int next_seq;  // the first one behind them
  int section;
  int sections;
  int level;
  int start;  // tiles of the sections and levels ahead
  bool in_pairs;
  // PairedTileScheduler, of a pair whose second tile comes next: its listed sequence, its head and
  // that tile (-1: none comes).
  int pair_seq;
  int pair_head;
  int second;
};

// Ragged values are transposed into blocks of 64 tokens first. The blocks of a sequence begin here:
// sequences never share one, and no prefix sum is needed.
__host__ __device__ constexpr int FirstBlock(int ragged_token, int batch_idx) {
  return ragged_token / kBlockSize + batch_idx;
}

}  // namespace fastattn::cuda::wgmma_sm90
