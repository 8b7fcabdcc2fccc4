// Where a work tile's queries and the blocks of its KV tiles lie.
#pragma once

#include "cuda/attention/wgmma_sm90/common/kv_blocks.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_q16 {

// Starts the copy of a consumer's queries of a work tile. Called by one thread.
template <class C>
__device__ void CopyQueries(const Arguments& a, Shared<C>& shared, const volatile WorkTile& tile,
                            int consumer, uint64_t* barrier) {
  for (int slice = 0; slice < C::kSlices; ++slice) {
    CopyBox(&a.query, shared.query + (consumer * C::kSlices + slice) * 64 * C::kSlice, barrier,
            slice * C::kSlice, tile.head, tile.token + 64 * consumer);
  }
}

// Blocks of a KV tile (-1: not assigned) and its flags.
struct KvTileBlocks {
  int id[2];  // the second one only where a KV tile has two
  int flags;
};

// Whether some query of the work tile sees only a part of an iteration's KV tile.
template <class C>
__device__ bool IsPartlyMasked(const volatile WorkTile& tile, int iteration) {
  const int start = (tile.last_kv_tile - iteration) * C::kKeys;
  return start < tile.unmasked_begin || start + C::kKeys > tile.unmasked_end;
}

// Looks up the blocks of kBlockLookups iterations from `iteration` on, in place of those of the
// iterations 2 * kBlockLookups ahead of them. Called by a warp.
template <class C>
__device__ void LookUpBlocks(const AttentionParams& p, Shared<C>& shared, int buffer,
                             int iteration) {
  const int block = FindBlock<false, C::kBlocks>(p, shared.tile[buffer], iteration,
                                                 threadIdx.x % 32, p.cache.num_blocks);
  shared.blocks[buffer][iteration / kBlockLookups % 2][threadIdx.x % 32] = block;
  __syncwarp();
}

// The blocks of an iteration that have been looked up.
template <class C>
__device__ KvTileBlocks BlocksOf(const Shared<C>& shared, int buffer, int iteration) {
  const volatile int* found = shared.blocks[buffer][iteration / kBlockLookups % 2];
  KvTileBlocks blocks;
  blocks.flags = IsPartlyMasked<C>(shared.tile[buffer], iteration) ? kNeedsScrub : 0;
#pragma unroll
  for (int i = 0; i < C::kBlocks; ++i) {
    blocks.id[i] = found[C::kBlocks * (iteration % kBlockLookups) + i];
    if (blocks.id[i] < 0) blocks.flags |= kUnassigned << i;
  }
  return blocks;
}

// Coordinates of a block in the tensor of keys or values. Those of a block that is not assigned lie
// outside of it, so that zeros arrive.
__device__ inline int2 BlockCoordinates(const AttentionParams& p, const BlockPlanes& planes,
                                        const volatile WorkTile& tile, int block) {
  if (p.paged) return make_int2(0, planes.Of(block, tile.kv_head));
  const int end = static_cast<int>(p.ragged.num_tokens);
  return make_int2(block < 0 ? end : tile.ragged_token + block * kBlockSize, tile.kv_head);
}

}  // namespace fastattn::cuda::wgmma_q16
