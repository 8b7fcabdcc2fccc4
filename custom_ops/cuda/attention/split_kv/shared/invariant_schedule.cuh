// Which splits of which work tiles a CTA takes, and the chains of a split. What they are follows
// from positions of keys (plan/invariant_plan.h); the CTAs share all keys of a launch.
#pragma once

#include <cstdint>

#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/attention/split_kv/shared/task.h"
#include "params/attention.h"

namespace fastattn::cuda {

// Splits in KV tiles. The last of `most` ones has all keys from its first on.
template <int kKvTile>
struct KeySplits {
  static_assert(kFirstSplitKeys / kChainsOfSplit % kKvTile == 0, "a KV tile is in one chain");
  int most;

  __device__ __forceinline__ int Of(int kv_tile) const {
    return min(KeySplitOf(static_cast<uint32_t>(kv_tile) * kKvTile), most - 1);
  }
  __device__ __forceinline__ int Begin(int split) const {
    return static_cast<int>(KeySplitAt(split).begin / kKvTile);
  }
  __device__ __forceinline__ int End(int split) const {
    return split + 1 >= most ? 0x7FFFFFFF : Begin(split + 1);
  }
  // KV tiles of the chains [first, first + count) of a split.
  __device__ __forceinline__ KeyRange<int> Chains(int split, int first, int count) const {
    const KeySplit keys = KeySplitAt(split);
    const int begin = keys.begin / kKvTile, each = keys.keys / kChainsOfSplit / kKvTile;
    const bool last = first + count == kChainsOfSplit;
    return {begin + first * each, last ? End(split) : begin + (first + count) * each};
  }
};

inline constexpr uint32_t kTileCost = kWorkTileQuarters;
static_assert(kMostSharedCost < kMostCost / 2, "a task of many work tiles would be left out");

__device__ __forceinline__ uint64_t CostOfWorkTile(const InvariantTask& task, const SeqWork& work) {
  return task.whole_tiles ? 1 : 4ull * work.kv_tiles + kTileCost;
}

// Where a share begins or ends: a work tile, and a split of it, counted from the first one of its
// sequence.
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
  uint32_t stride;  // of the CTA's work tiles; more than 1: they are whole, the longest first
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
  const uint32_t each = static_cast<uint32_t>(CostOfWorkTile(task, work));
  const uint2 start = before[seq];
  const uint32_t at = (cost - start.x) / each, inside = (cost - start.x) - at * each;
  SplitEdge edge = {start.y + at, 0, seq};
  if (task.whole_tiles) return edge;
  // The nearest split: neighbouring shares find the same one.
  const KeySplits<kKvTile> splits{task.most_splits};
  const int kv_tile =
      work.first + static_cast<int>(inside > kTileCost ? (inside - kTileCost) / 4 : 0);
  const int end = work.first + work.kv_tiles, first = splits.Of(work.first);
  const int split = splits.Of(min(kv_tile, end - 1));
  const int split_begin = max(splits.Begin(split), work.first);
  const int split_end = min(splits.End(split), end);
  edge.split = split - first + (kv_tile - split_begin > split_end - kv_tile);
  if (split_end == end && edge.split > split - first) {
    edge.split = 0;
    ++edge.work_tile;
  }
  return edge;
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
  return {nullptr, {head * tiles, 0, seq}, {(head + 1) * tiles, 0, seq}, tiles, 1};
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
      const uint64_t work_tiles = static_cast<uint64_t>(work.tiles) * p.num_kv_heads;
      CountWork(work_tiles * CostOfWorkTile(task, work), work_tiles, sum);
    }
  };
  const int num_seqs = task.work.num_seqs;
  const uint2 sums = SumWork<kThreads>(num_seqs, before, warp_totals, work_of);
  InvariantSchedule schedule;
  schedule.before = before;
  schedule.stride = 1;
  const uint64_t all = sums.x;
  const uint32_t shares = task.work.shares;
  if (kTileRows == 64 && sums.y >= 2 * gridDim.x) {
    // So many work tiles balance by themselves, and leave nothing to be merged.
    schedule.stride = gridDim.x;
    schedule.begin = {blockIdx.x, 0, 0};
    schedule.end = {sums.y, 0, num_seqs - 1};
    schedule.num_work_tiles = (sums.y - blockIdx.x + gridDim.x - 1) / gridDim.x;
  } else {
    const auto edge = [&](uint32_t cta) {
      return SplitEdgeAt<kTileRows, kKvTile>(
          p, task, before, static_cast<uint32_t>(min(cta, shares) * all / shares));
    };
    const SplitEdge begin = edge(blockIdx.x), end = edge(blockIdx.x + 1);
    schedule.begin = begin;
    schedule.end = end;
    const bool empty = begin.work_tile == end.work_tile && begin.split == end.split;
    schedule.num_work_tiles = empty ? 0 : end.work_tile + (end.split > 0) - begin.work_tile;
  }
  // More cost than can be counted comes from lengths that no call has.
  if (sums.x >= kMostCost) schedule.num_work_tiles = 0;
  return schedule;
}

// The CTA's splits of its n-th work tile: `num_splits` is how many of it come after them in other
// CTAs, where the CTA has its first.
template <int kTileRows, int kKvTile>
__device__ __forceinline__ Segment MakeInvariantSegment(const AttentionParams& p,
                                                        const InvariantTask& task,
                                                        const InvariantSchedule& schedule,
                                                        uint32_t n) {
  const uint32_t work_tile = schedule.begin.work_tile + n * schedule.stride;
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
  if (schedule.stride > 1) s.tile = work.tiles - 1 - s.tile;
  SetVisibleKeys<kTileRows>(p, task.work, &s);
  const KeySplits<kKvTile> splits{task.most_splits};
  // What the work tile sees of its sequence's splits. One that sees no key has the first split
  // only, and other CTAs leave nothing of it. mask_offsets may be negative.
  const int own_begin = max(s.seen_by_any.begin, 0) / kKvTile;
  const int own_end = max((s.seen_by_any.end + kKvTile - 1) / kKvTile, own_begin);
  const int first = splits.Of(work.first);
  const int own_last = own_end > own_begin ? splits.Of(own_end - 1) : first;
  const bool begins = work_tile != schedule.begin.work_tile || schedule.begin.split == 0;
  const int begin = begins ? first : first + schedule.begin.split;
  const bool cut = work_tile == schedule.end.work_tile && first + schedule.end.split <= own_last;
  const int end = cut ? first + schedule.end.split : own_last + 1;
  s.begins_work_tile = begins;
  s.ends_work_tile = !cut;
  const int own_first = splits.Of(own_begin);
  s.num_splits = begins && cut ? own_last + 1 - max(end, own_first) : 0;
  s.kv_tile_begin = begins ? own_begin : max(own_begin, splits.Begin(begin));
  s.kv_tile_end = min(own_end, cut ? splits.Begin(end) : own_end);
  s.kv_tile_begin = min(s.kv_tile_begin, own_end);
  s.kv_tile_end = max(s.kv_tile_end, s.kv_tile_begin);
  return s;
}

}  // namespace fastattn::cuda
