// Which tiles are whose: all units of work of all groups in a row, an equal share for each CTA. A
// group has kGroupUnits units and one for each tile, in this order. A cell's value does not depend
// on who computes it.
#pragma once

#include "cuda/mqa_logits/config.h"

namespace fastattn::cuda::mqa_logits {

struct TileRange {
  int begin, end;
};

__device__ __forceinline__ TileRange TilesOf(VisibleKeys keys) {
  if (keys.begin >= keys.end) return {0x7FFFFFFF, 0};
  return {keys.begin / kTileKeys, (keys.end + kTileKeys - 1) / kTileKeys};
}

// Tiles that some row of the group sees, by one thread.
__device__ inline TileRange GroupTiles(const LogitsParams& p, const LogitsGroups& groups,
                                       int group) {
  const int row = groups.FirstRow(p, group), rows = groups.RowsOf(p, group);
  const int sequence = groups.Sequence(group);
  TileRange tiles = {0x7FFFFFFF, 0};
  for (int r = 0; r < rows; ++r) {
    const TileRange x = TilesOf(VisibleKeysOf(p, sequence, row + r));
    tiles.begin = min(tiles.begin, x.begin);
    tiles.end = max(tiles.end, x.end);
  }
  return tiles;
}

// The same by a warp, a row a lane.
__device__ __forceinline__ TileRange GroupTilesOfWarp(const LogitsParams& p,
                                                      const LogitsGroups& groups, int group,
                                                      int lane) {
  const int row = groups.FirstRow(p, group), rows = groups.RowsOf(p, group);
  const int sequence = groups.Sequence(group);
  const TileRange x =
      lane < rows ? TilesOf(VisibleKeysOf(p, sequence, row + lane)) : TileRange{0x7FFFFFFF, 0};
  return {__reduce_min_sync(~0u, x.begin), __reduce_max_sync(~0u, x.end)};
}

template <class C>
__device__ __forceinline__ int UnitsOf(TileRange tiles) {
  return tiles.end > tiles.begin ? tiles.end - tiles.begin + C::kGroupUnits : 0;
}

__device__ __forceinline__ int64_t ShareBegin(int64_t total, int cta) {
  return total * cta / static_cast<int>(gridDim.x);
}

// Prefetches a decode step's block tables, weights and queries into the L2 cache, a line a thread
// of the grid: a step is so short that what is read one after the other had better not come from
// memory each time.
__device__ __forceinline__ void PrefetchInputs(const LogitsParams& p) {
  constexpr int64_t kLine = 128;
  int64_t line = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const auto prefetch = [&](const void* data, int64_t bytes) {
    const int64_t lines = (bytes + kLine - 1) / kLine;
    if (line >= 0 && line < lines) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(data) + line * kLine));
    }
    line -= lines;
  };
  if (p.max_blocks > 0) {
    prefetch(p.block_tables, ((p.batch - 1) * p.table_stride + p.max_blocks) * 4);
  }
  prefetch(p.weights, p.rows * p.num_heads * 4);
  prefetch(p.q, p.rows * p.num_heads * p.CodeBytes());
}

// Finds the group and the unit with which this CTA's share begins. All threads of the CTA.
template <class C>
__device__ __forceinline__ void FindShare(const LogitsParams& p, const LogitsGroups& groups,
                                          Shared<C>& shared) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int each = (groups.count + C::kThreads - 1) / C::kThreads;
  const int first = min(thread * each, groups.count), last = min(first + each, groups.count);
  int64_t sum = 0;
  for (int group = first; group < last; ++group) {
    sum += UnitsOf<C>(GroupTiles(p, groups, group));
  }
  int64_t before = sum;  // up to and with this thread, then without it
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) shared.warp_sums[warp] = before;
  __syncthreads();
  int64_t total = 0;
  before -= sum;
#pragma unroll
  for (int w = 0; w < C::kThreads / 32; ++w) {
    const int64_t x = shared.warp_sums[w];
    before += w < warp ? x : 0;
    total += x;
  }
  int64_t offset = ShareBegin(total, blockIdx.x) - before;
  if (offset >= 0 && offset < sum) {
    int group = first;
    for (; group + 1 < last; ++group) {
      const int units = UnitsOf<C>(GroupTiles(p, groups, group));
      if (offset < units) break;
      offset -= units;
    }
    shared.first_group = group;
    shared.first_unit = static_cast<int>(offset);
  }
  if (thread == 0) shared.total = total;
  __syncthreads();
}

}  // namespace fastattn::cuda::mqa_logits
