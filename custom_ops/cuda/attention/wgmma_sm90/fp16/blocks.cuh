// Where a tile's queries and the blocks of its steps lie.
#pragma once

#include "cuda/attention/wgmma_sm90/fp16/config.h"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_fp16 {

// Starts the copy of a consumer's queries of a tile. Called by one thread.
template <class C>
__device__ void CopyQueries(const Arguments& a, Shared<C>& shared, const volatile Tile& tile,
                            int consumer, uint64_t* barrier) {
  for (int slice = 0; slice < C::kSlices; ++slice) {
    CopyBox(&a.query, shared.query + (consumer * C::kSlices + slice) * 64 * C::kSlice, barrier,
            slice * C::kSlice, tile.head, tile.token + 64 * consumer);
  }
}

// Blocks of a step, -1: not assigned, and its flags.
struct StepBlocks {
  int id[2];
  int flags;
};

// The block of each lane: half lane % 2 of step `step` + lane / 2. -1: it is not assigned.
__device__ inline int FindBlock(const AttentionParams& p, const volatile Tile& tile, int step) {
  const int lane = threadIdx.x % 32;
  const int slot = 2 * (tile.last - step - lane / 2) + lane % 2;
  if (slot < 0 || slot >= (tile.k_len + kBlockSize - 1) / kBlockSize) return -1;
  if (!p.paged) return slot;
  const int64_t row = static_cast<int64_t>(tile.row) * p.seqs.max_blocks;
  const int id = p.seqs.block_tables[row + slot];
  return id < 0 || id >= p.cache.num_blocks ? -1 : id;
}

// Whether some query of the tile sees a part of the step only.
template <class C>
__device__ bool IsPartial(const volatile Tile& tile, int step) {
  const int start = (tile.last - step) * C::kKeys;
  return start < tile.common_lo || start + C::kKeys > tile.common_hi;
}

// Steps whose blocks a warp finds at once. A tile has two such windows in shared memory.
inline constexpr int kWindow = 16;

// Finds the window that begins with `step`; those two windows ahead are gone. Called by a warp.
template <class C>
__device__ void FindWindow(const AttentionParams& p, Shared<C>& shared, int buffer, int step) {
  const int block = FindBlock(p, shared.tile[buffer], step);
  shared.blocks[buffer][step / kWindow % 2][threadIdx.x % 32] = block;
  __syncwarp();
}

// Those of a step, which its window has.
template <class C>
__device__ StepBlocks BlocksOf(const Shared<C>& shared, int buffer, int step) {
  const volatile int* window = shared.blocks[buffer][step / kWindow % 2];
  StepBlocks blocks;
  blocks.flags = IsPartial<C>(shared.tile[buffer], step) ? kClean : 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    blocks.id[i] = window[2 * (step % kWindow) + i];
    if (blocks.id[i] < 0) blocks.flags |= kUnassigned << i;
  }
  return blocks;
}

// Coordinates of a block in the tensor of keys or values. One that is not assigned lies outside of
// it: it arrives as zeros.
__device__ inline int2 PlaceOf(const AttentionParams& p, const BlockPlanes& planes,
                               const volatile Tile& tile, int block) {
  if (p.paged) return make_int2(0, planes.Of(block, tile.kv_head));
  const int end = static_cast<int>(p.ragged.num_tokens);
  return make_int2(block < 0 ? end : tile.key_token + block * kBlockSize, tile.kv_head);
}

}  // namespace fastattn::cuda::wgmma_fp16
