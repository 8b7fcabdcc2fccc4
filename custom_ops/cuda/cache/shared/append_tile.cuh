// Which cached tokens a CTA gathers, and when it may look for them.
#pragma once

#include <cstdint>

#include "common/block_table.h"
#include "common/seq_lengths.h"
#include "cuda/cache/shared/seq_tiles.cuh"
#include "cuda/common/pdl.cuh"
#include "params/cache.h"

namespace fastattn::cuda {

// The cached tokens of a sequence that lie in one block.
struct AppendTile {
  int block;  // negative: nothing to gather
  int count;
  int64_t out_token;  // of the first one
};

// Those of a tile slot. All threads get the same.
__device__ __forceinline__ AppendTile FindAppendTile(const AppendCacheParams& p, int64_t slot) {
  constexpr AppendTile kNothing = {-1, 0, 0};
  const int batch_idx = FindSeq(p.cu_seqlens_k, p.batch, slot);
  if (batch_idx < 0) return kNothing;
  const TokenRange<int64_t> out =
      WrittenTokens<int64_t>(p.cu_seqlens_k[batch_idx], p.cu_seqlens_k[batch_idx + 1],
                             CachedTokens(p, batch_idx), p.num_out_tokens);
  const int64_t tile = slot - FirstSlot(static_cast<int>(out.begin), batch_idx);
  const int64_t tokens = out.count - tile * kBlockSize;
  if (tokens <= 0 || tile >= p.max_blocks) return kNothing;
  const int block = *BlockEntry(p.block_tables, p.max_blocks, batch_idx, tile);
  return {AssignedBlock(block, p.cache.num_blocks),
          static_cast<int>(min(tokens, int64_t{kBlockSize})), out.begin + tile * kBlockSize};
}

// The same at the beginning of a kernel, before its first access to global memory. Where the kernel
// ahead writes into the cache, but no length and no table, the search runs beside its last CTAs,
// and a CTA that finds nothing ends there: in a step of decoding sequences all of them. Afterwards
// the cache can be read.
__device__ __forceinline__ AppendTile BeginAppendTile(const AppendCacheParams& p, int64_t slot) {
  if (p.overlaps_previous) {
    PdlBeginConcurrent();
  } else {
    PdlWait();
  }
  const AppendTile tile = FindAppendTile(p, slot);
  if (!p.overlaps_previous) return tile;
  if (tile.block < 0) {
    PdlEndConcurrent();
  } else {
    PdlWait();
    PdlLaunchDependents();
  }
  return tile;
}

}  // namespace fastattn::cuda
