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

// Tiles of a step's groups, if these are few and a length each tells them: lane i has those of
// kEach groups from i * kEach on. Lengths are asked for before they are needed.
template <int kEach>
struct Lengths {
  int length[kEach];

  __device__ __forceinline__ static bool Known(const LogitsParams& p, const LogitsGroups& groups) {
    return groups.count <= 32 * kEach && (!p.lens_per_row || groups.rows == 1);
  }

  // Asks for the lengths.
  __device__ __forceinline__ void Load(const LogitsParams& p, const LogitsGroups& groups,
                                       int lane) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int group = lane * kEach + j;
      length[j] = 0;
      if (group < groups.count) {
        length[j] =
            p.context_lens[p.lens_per_row ? groups.FirstRow(p, group) : groups.Sequence(group)];
      }
    }
  }

  // Tiles that the last row of a group sees, which sees most; `most` keys are there.
  __device__ __forceinline__ int Tiles(const LogitsParams& p, const LogitsGroups& groups, int most,
                                       int lane, int j) const {
    int x = length[j];
    if (groups.per_sequence > 1 && !p.lens_per_row) {
      const int group = lane * kEach + j;
      const int part = group - groups.Sequence(group) * groups.per_sequence;
      x = max(x, 0) - max(static_cast<int>(p.next_n) - (part + 1) * groups.rows, 0);
    }
    return (min(max(x, 0), most) + kTileKeys - 1) / kTileKeys;
  }
};

// a / b, rounded up, for 0 < a < 2^22 and b > 0.
__device__ __forceinline__ int DivideUp(int a, int b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(b)));
  const int x = static_cast<int>(static_cast<float>(a) * inverse);
  return x + (x * b < a ? 1 : 0);
}

// A decode step's, by one warp. Where CTAs that have `chunk` tiles of one group each take hardly
// longer than equal shares would, they do: a CTA that goes on to a second group waits for its
// queries, which counts where it has few tiles. A share is (group, unit, units) either way. Writes
// the groups' tiles to shared memory.
template <class C, int kEach>
__device__ __forceinline__ Share FindKnownShare(const LogitsParams& p, const LogitsGroups& groups,
                                                const Lengths<kEach>& lengths, int most, int lane,
                                                int* group_tiles) {
  const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  int tiles[kEach], sum = 0, active = 0, longest = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    tiles[j] = lengths.Tiles(p, groups, most, lane, j);
    group_tiles[lane * kEach + j] = tiles[j];
    sum += tiles[j], active += tiles[j] > 0, longest = max(longest, tiles[j]);
  }
  __syncwarp();
  if (kEach == 1 && groups.count == 1) {
    const int end = __shfl_sync(~0u, tiles[0], 0);
    Share share = {0, 0, 0, {0, end}};
    share.unit = ShareOfCta(end > 0 ? end + C::kGroupUnits : 0, &share.units);
    return share;
  }
  sum = __reduce_add_sync(~0u, sum);
  longest = __reduce_max_sync(~0u, longest);
  active = kEach == 1 ? __popc(__ballot_sync(~0u, active > 0)) : __reduce_add_sync(~0u, active);
  int chunk = 0;
  if (active > 1 && active <= ctas && sum <= kMostWhole * ctas) {
    const int spare = max(ctas - active, 1);
    // CTAs of each group, at least; the more, the fewer are left over.
    const int each = DivideUp(ctas + 1, active) - 1;
    chunk = DivideUp(longest, each);
    if (active < ctas) chunk = min(chunk, DivideUp(sum, spare));
    const float slack = static_cast<float>(chunk) * ctas - sum;
    chunk = slack > ctas + sum * C::kWholeSlack ? 0 : chunk;
  }
  int parts[kEach], mine = 0;  // CTAs, or units, of a group
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    parts[j] = tiles[j] == 0 ? 0
               : chunk > 0   ? DivideUp(tiles[j], chunk)
                             : tiles[j] + C::kGroupUnits;
    mine += parts[j];
  }
  const int through = SumUpToLane(mine, lane);
  int before = through - mine, units = 1;
  int begin = cta;
  if (chunk == 0) begin = ShareOfCta(__shfl_sync(~0u, through, 31), &units);
  Share share = {0, 0, units, {0, 0}};
  bool owner = false;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (begin >= before && begin < before + parts[j]) {
      share.group = lane * kEach + j, share.unit = begin - before, share.tiles.end = tiles[j];
      owner = true;
    }
    before += parts[j];
  }
  if (chunk > 0) {
    const int from = share.unit * chunk;
    share.unit = from + C::kGroupUnits, share.units = min(chunk, share.tiles.end - from);
  }
  const uint32_t found = __ballot_sync(~0u, owner);
  const int lane_of = found != 0 ? __ffs(found) - 1 : 0;
  share.group = __shfl_sync(~0u, share.group, lane_of);
  share.unit = __shfl_sync(~0u, share.unit, lane_of);
  share.units = found != 0 ? __shfl_sync(~0u, share.units, lane_of) : 0;
  share.tiles.end = __shfl_sync(~0u, share.tiles.end, lane_of);
  return share;
}

// A decode step's of any number of groups, by one warp.
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

// Prefetches a decode step's lengths, block tables, weights and queries into the L2 cache, a line a
// thread of the grid: a step is so short that what is read one after the other had better not come
// from memory each time. Thread `thread` of `threads` in the CTA.
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
  prefetch(p.context_lens, (p.lens_per_row ? p.rows : p.batch) * 4);
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
