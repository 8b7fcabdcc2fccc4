// Which cache blocks a KV tile consists of.
#pragma once

#include "common/block_table.h"
#include "cuda/attention/wgmma_sm90/common/work_tile.h"

namespace fastattn::cuda::wgmma_sm90 {

// KV iterations whose blocks a warp looks up at once, a lane a block.
inline constexpr int kBlockLookups = 16;

// The block of each lane: with kBlocks = 2 a KV tile, half lane % 2 of iteration `iteration` + lane
// / 2; with one, that of iteration `iteration` + lane; -1: it is not assigned. Paged ones are below
// `num_blocks`. Ragged ones are numbered from the sequence's first one on, or with kTransposed from
// that of the transposed values.
template <bool kTransposed, int kBlocks = 2>
__device__ inline int FindBlock(const AttentionParams& p, const volatile WorkTile& tile,
                                int iteration, int lane, const int& num_blocks) {
  const int block_idx = kBlocks == 2 ? 2 * (tile.last_kv_tile - iteration - lane / 2) + lane % 2
                                     : tile.last_kv_tile - iteration - lane;
  if (block_idx < 0 || block_idx >= (tile.k_len + kBlockSize - 1) / kBlockSize) return -1;
  if (!p.paged) return kTransposed ? tile.ragged_block + block_idx : block_idx;
  const SeqMeta& seqs = p.seqs;
  const int id = *BlockEntry(seqs.block_tables, seqs.max_blocks, tile.batch_idx, block_idx);
  // AssignedBlock(): a call of that was measured to be other code.
  return id < 0 || id >= num_blocks ? -1 : id;
}

}  // namespace fastattn::cuda::wgmma_sm90
