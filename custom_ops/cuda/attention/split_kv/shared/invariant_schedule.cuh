// Which splits of which work tiles a CTA takes. What a split is follows from its sequence; the CTAs
// share all splits of a launch by their cost.
#pragma once

#include <cstdint>

#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/attention/split_kv/shared/task.h"
#include "params/attention.h"

namespace fastattn::cuda {

__device__ __forceinline__ InvariantSplits SplitsOf(const InvariantTask& task,
                                                    const SeqWork& work) {
  return InvariantSplitsOf(work.kv_tiles, task.most_splits, task.least_tiles);
}

// Costs, in quarters of a KV tile: what a split takes beside its keys, and a work tile.
inline constexpr uint32_t kSplitCost = 4;
inline constexpr uint32_t kTileCost = 24;

// Of a split. Those of a work tile all count the same, so that equal shares of equal work tiles
// begin where splits do.
__device__ __forceinline__ uint64_t CostOfSplit(const InvariantTask& task, const SeqWork& work,
                                                const InvariantSplits& splits) {
  if (task.whole_tiles) return 1;  // a work tile a CTA
  return (4ull * work.kv_tiles + kTileCost) / splits.count + kSplitCost;
}

// Where a share begins or ends: a work tile, and a split of it.
struct SplitEdge {
  uint32_t work_tile;
  int split;
  int seq;  // which holds that point, or one before it
};

struct InvariantSchedule {
  const uint2* before;  // [num_seqs + 1]: cost, work tiles; null: work tiles count from begin.seq's
  SplitEdge begin;
  SplitEdge end;
  uint32_t num_work_tiles;
};

template <int kTileRows, int kKvTile>
__device__ __forceinline__ SplitEdge SplitEdgeAt(const AttentionParams& p,
                                                 const InvariantTask& task, const uint2* before,
                                                 uint32_t cost) {
  const int num_seqs = task.work.num_seqs;
  const uint2 all = before[num_seqs];
  if (cost >= all.x) return {all.y, 0, num_seqs - 1};
  const int seq = SeqAt(before, num_seqs, cost);
  const SeqWork work =
      WorkOf<kTileRows, kKvTile>(p, task.work, LoadSeqShape(p, task.work.first_seq + seq));
  const InvariantSplits splits = SplitsOf(task, work);
  const uint32_t each = static_cast<uint32_t>(CostOfSplit(task, work, splits));
  const uint32_t count = task.whole_tiles ? 1 : splits.count;
  const uint2 start = before[seq];
  // The nearest split: neighbouring shares find the same one.
  const uint32_t at = (cost - start.x + each / 2) / each;
  return {start.y + at / count, static_cast<int>(at % count), seq};
}

// The share of a CTA that has a sequence's KV head to itself: nothing is added up over the
// sequences.
template <int kTileRows, int kKvTile>
__device__ __forceinline__ InvariantSchedule MakeHeadSchedule(const AttentionParams& p,
                                                              const InvariantTask& task) {
  const int seq = blockIdx.x / p.num_kv_heads;
  const uint32_t head = blockIdx.x - seq * p.num_kv_heads;
  const uint32_t tiles =
      WorkOf<kTileRows, kKvTile>(p, task.work, LoadSeqShape(p, task.work.first_seq + seq)).tiles;
  return {nullptr, {head * tiles, 0, seq}, {(head + 1) * tiles, 0, seq}, tiles};
}

// Fills before[0 .. num_seqs] and returns the CTA's share. All threads take part.
template <int kTileRows, int kKvTile, int kThreads>
__device__ __forceinline__ InvariantSchedule MakeInvariantSchedule(const AttentionParams& p,
                                                                   const InvariantTask& task,
                                                                   uint2* before,
                                                                   uint2* warp_totals) {
  if constexpr (kTileRows == 8) {  // with more, more registers would spill
    if (task.whole_tiles && gridDim.x == task.work.num_seqs * p.num_kv_heads) {
      return MakeHeadSchedule<kTileRows, kKvTile>(p, task);
    }
  }
  const auto work_of = [&](int seq, uint2* sum) {
    const SeqWork work =
        WorkOf<kTileRows, kKvTile>(p, task.work, LoadSeqShape(p, task.work.first_seq + seq));
    if (work.tiles > 0) {
      const InvariantSplits splits = SplitsOf(task, work);
      const uint64_t work_tiles = static_cast<uint64_t>(work.tiles) * p.num_kv_heads;
      const uint64_t cost = work_tiles * CostOfSplit(task, work, splits);
      CountWork(cost * (task.whole_tiles ? 1 : splits.count), work_tiles, sum);
    }
  };
  const int num_seqs = task.work.num_seqs;
  const uint2 sums = SumWork<kThreads>(num_seqs, before, warp_totals, work_of);
  InvariantSchedule schedule;
  schedule.before = before;
  const uint64_t all = sums.x;
  const auto edge = [&](uint64_t cta) {
    return SplitEdgeAt<kTileRows, kKvTile>(p, task, before,
                                           static_cast<uint32_t>(cta * all / gridDim.x));
  };
  const SplitEdge begin = edge(blockIdx.x), end = edge(blockIdx.x + 1);
  schedule.begin = begin;
  schedule.end = end;
  const bool empty = begin.work_tile == end.work_tile && begin.split == end.split;
  schedule.num_work_tiles = empty ? 0 : end.work_tile + (end.split > 0) - begin.work_tile;
  // More cost than can be counted comes from lengths that no call has.
  if (sums.x >= kMostCost) schedule.num_work_tiles = 0;
  return schedule;
}

// The CTA's splits of a work tile: `num_splits` is how many of it come behind them in other CTAs,
// where the CTA has its first.
template <int kTileRows, int kKvTile>
__device__ __forceinline__ Segment MakeInvariantSegment(const AttentionParams& p,
                                                        const InvariantTask& task,
                                                        const InvariantSchedule& schedule,
                                                        uint32_t work_tile) {
  int seq = schedule.begin.seq;
  uint32_t index = work_tile;  // of the sequence's
  if (kTileRows != 8 || schedule.before != nullptr) {
    while (seq < task.work.num_seqs - 1 && schedule.before[seq + 1].y <= work_tile) ++seq;
    index -= schedule.before[seq].y;
  }
  Segment s;
  s.batch_idx = task.work.first_seq + seq;
  s.shape = LoadSeqShape(p, s.batch_idx);
  const SeqWork work = WorkOf<kTileRows, kKvTile>(p, task.work, s.shape);
  s.head = index / work.tiles;
  s.tile = index - s.head * work.tiles;
  SetVisibleKeys<kTileRows>(p, task.work, &s);
  // Splits count from the work tile's own first KV tile.
  const int tiles = SplitsOf(task, work).tiles;
  const int first = s.seen_by_any.begin / kKvTile;
  const int all = max((s.seen_by_any.end + kKvTile - 1) / kKvTile - first, 0);
  const int count = max((all + tiles - 1) / tiles, 1);
  const int begin = work_tile == schedule.begin.work_tile ? schedule.begin.split : 0;
  const int end = work_tile == schedule.end.work_tile ? schedule.end.split : count;
  s.begins_work_tile = begin == 0;
  s.ends_work_tile = end >= count;
  s.num_splits = s.begins_work_tile && !s.ends_work_tile ? count - end : 0;
  s.kv_tile_begin = first + min(begin * tiles, all);
  s.kv_tile_end = first + (s.ends_work_tile ? all : end * tiles);
  return s;
}

}  // namespace fastattn::cuda
