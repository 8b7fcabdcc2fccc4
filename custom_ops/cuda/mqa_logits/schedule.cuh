// Which tiles are whose: all units of work of all groups in a row, an equal share for each CTA. A
// group has kGroupUnits units and one for each tile, in this order. A cell's value does not depend
// on who computes it.
#pragma once

#include "cuda/mqa_logits/config.h"

namespace fastattn::cuda::mqa_logits {

// Parameters of which the compiler knows what the variant does, and leaves out the rest.
template <class C>
__device__ __forceinline__ LogitsParams KnownParams(LogitsParams p) {
  p.paged = C::kPaged;
  p.head_dim = kDim;
  p.num_heads = C::kHeads;
  p.quant = C::kQuant;
  return p;
}

template <class C>
__device__ __forceinline__ LogitsGroups KnownGroups(LogitsGroups groups) {
  if (C::kPaged && C::kColumns == 64) groups.per_sequence = 1;
  return groups;
}

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
  // Of rows that share a length the last sees most. No loop here is unrolled: a step has not run
  // long before it gets here, and waits for each instruction that is fetched.
#pragma unroll 1
  for (int r = p.paged && !p.lens_per_row ? rows - 1 : 0; r < rows; ++r) {
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

// The CTA's share of `total` units: the first one, and how many. 32 bits are enough: the host sees
// to that.
__device__ __forceinline__ int ShareOfCta(int total, int* units) {
  const int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x);
  const int each = static_cast<uint32_t>(total) / gridDim.x, rest = total - each * ctas;
  *units = each + (cta < rest ? 1 : 0);
  return each * cta + min(cta, rest);
}

__device__ __forceinline__ int SumUpToLane(int x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// Group and unit at `offset` units behind those of group `first`.
template <class C>
__device__ __forceinline__ void Walk(const LogitsParams& p, const LogitsGroups& groups, int first,
                                     int last, int offset, int* group, int* unit) {
  int at = first;
#pragma unroll 1
  for (; at + 1 < last; ++at) {
    const int units = UnitsOf<C>(GroupTiles(p, groups, at));
    if (offset < units) break;
    offset -= units;
  }
  *group = at, *unit = offset;
}

// A decode step's, by each warp that wants to know: a step's groups are few, and the shorter the
// way to its first keys the better.
template <class C>
__device__ __forceinline__ Share FindShareOfWarp(const LogitsParams& p, const LogitsGroups& groups,
                                                 int lane) {
  const int each = (groups.count + 31) / 32;
  const int first = min(lane * each, groups.count), last = min(first + each, groups.count);
  int sum = 0;
  TileRange tiles = {0, 0};
#pragma unroll 1
  for (int group = first; group < last; ++group) {
    tiles = GroupTiles(p, groups, group);
    sum += UnitsOf<C>(tiles);
  }
  const int through = SumUpToLane(sum, lane), before = through - sum;
  Share share = {0, 0, 0, tiles};
  const int begin = ShareOfCta(__shfl_sync(~0u, through, 31), &share.units);
  const bool mine = begin >= before && begin < through;
  if (mine) {
    share.group = first, share.unit = begin - before;
    if (last - first > 1) {
      Walk<C>(p, groups, first, last, begin - before, &share.group, &share.unit);
      share.tiles = GroupTiles(p, groups, share.group);
    }
  }
  const uint32_t found = __ballot_sync(~0u, mine);
  const int lane_of = found != 0 ? __ffs(found) - 1 : 0;
  share.group = __shfl_sync(~0u, share.group, lane_of);
  share.unit = __shfl_sync(~0u, share.unit, lane_of);
  share.tiles.begin = __shfl_sync(~0u, share.tiles.begin, lane_of);
  share.tiles.end = __shfl_sync(~0u, share.tiles.end, lane_of);
  return share;
}

// Prefetches a decode step's block tables, weights and queries into the L2 cache, a line a thread
// of the grid: a step is so short that what is read one after the other had better not come from
// memory each time. Thread `thread` of `threads` in the CTA.
__device__ __forceinline__ void PrefetchInputs(const LogitsParams& p, int thread, int threads) {
  constexpr int64_t kLine = 128;
  int64_t line = int64_t{blockIdx.x} * threads + thread;
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

// A prompt's, by all threads of the CTA.
template <class C>
__device__ __forceinline__ void FindShare(const LogitsParams& p, const LogitsGroups& groups,
                                          Shared<C>& shared) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int each = (groups.count + C::kThreads - 1) / C::kThreads;
  const int first = min(thread * each, groups.count), last = min(first + each, groups.count);
  int sum = 0;
  for (int group = first; group < last; ++group) {
    sum += UnitsOf<C>(GroupTiles(p, groups, group));
  }
  int before = SumUpToLane(sum, lane);
  if (lane == 31) shared.warp_sums[warp] = before;
  __syncthreads();
  int total = 0;
  before -= sum;
#pragma unroll
  for (int w = 0; w < C::kThreads / 32; ++w) {
    const int x = shared.warp_sums[w];
    before += w < warp ? x : 0;
    total += x;
  }
  int units;
  const int offset = ShareOfCta(total, &units) - before;
  if (thread == 0) shared.share.units = units;
  if (offset >= 0 && offset < sum) {
    Walk<C>(p, groups, first, last, offset, &shared.share.group, &shared.share.unit);
  }
  __syncthreads();
}

}  // namespace fastattn::cuda::mqa_logits
