// Which work tiles, (sequence, KV head, tile of queries), and which of their keys a CTA works on:
// found on the device, as the host does not know the lengths.
#pragma once

#include <cstdint>

#include "common/holes.h"
#include "common/visible_keys.h"
#include "cuda/attention/shared/forms.cuh"
#include "cuda/attention/shared/seq_lengths.cuh"
#include "cuda/attention/split_kv/shared/task.h"
#include "cuda/common/cluster.cuh"
#include "params/attention.h"
#include "plan/limits.h"

namespace fastattn::cuda {

// Keys that query `index` of a sequence sees, mask_offsets apart.
__device__ __forceinline__ KeyRange<int> KeysOfQuery(const AttentionParams& p, const SeqShape& seq,
                                                     int index) {
  const int position = index + seq.k_len - seq.q_len;
  KeyRange<int> keys = VisibleKeys<Sm80Form>(p, position, seq.k_limit);
  keys.end = max(keys.end, 0);
  keys.begin = min(keys.begin, keys.end);
  return keys;
}

// Work of a sequence: `tiles` work tiles for each KV head, each over the KV tiles [first, first +
// kv_tiles) of the sequence's keys. A work tile may see fewer of them.
struct SeqWork {
  int tiles;
  int first;
  int kv_tiles;
};

__device__ __forceinline__ SeqWork WorkOf(const AttentionParams& p, const AttentionTask& task,
                                          const SeqShape& seq, int tile_rows, int kv_tile) {
  const int packed_rows = seq.q_len * task.group;
  if (packed_rows == 0 || packed_rows < task.min_packed_rows || packed_rows > task.max_packed_rows)
    return {0, 0, 0};
  const int first = KeysOfQuery(p, seq, 0).begin / kv_tile;
  const int end = KeysOfQuery(p, seq, seq.q_len - 1).end;
  // A sequence that sees nothing still has its output to write.
  const int kv_tiles = max((end + kv_tile - 1) / kv_tile - first, 1);
  return {(packed_rows + tile_rows - 1) / tile_rows, first, kv_tiles};
}

template <int kTileRows, int kKvTile>
__device__ __forceinline__ SeqWork WorkOf(const AttentionParams& p, const AttentionTask& task,
                                          const SeqShape& seq) {
  return WorkOf(p, task, seq, kTileRows, kKvTile);
}

// Whether clusters take a call in which the host left that open, by the lengths of its sequences.
// All CTAs of the attention kernel, and those of the one that merges, find the same. Sets a bit in
// `working` [num_seqs / 32, rounded up], in shared memory, for each sequence that has work. All
// threads take part.
template <int kThreads>
__device__ __forceinline__ bool ClustersTakeCall(const AttentionParams& p,
                                                 const AttentionTask& task, int tile_rows,
                                                 int kv_tile, uint32_t* working) {
  constexpr int kRounds = kMaxPlanSeqs / kThreads;
  // The lengths of all rounds are asked for before any is looked at: one latency, not several.
  SeqShape shapes[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int seq = r * kThreads + static_cast<int>(threadIdx.x);
    shapes[r] = {};
    if (seq < task.num_seqs) shapes[r] = LoadSeqShape(p, task.first_seq + seq);
  }
  bool takes = true;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (r * kThreads >= task.num_seqs) break;
    const int seq = r * kThreads + static_cast<int>(threadIdx.x);
    const SeqWork work = WorkOf(p, task, shapes[r], tile_rows, kv_tile);
    // A cluster would take several work tiles one after the other.
    takes = takes && work.tiles <= 1 && work.kv_tiles <= task.cluster_kv_tiles;
    const uint32_t vote = __ballot_sync(0xFFFFFFFFu, work.tiles > 0);
    if (seq % 32 == 0 && seq < task.num_seqs) working[seq / 32] = vote;
  }
  return __syncthreads_and(takes || task.cluster_kv_tiles == kAnyKvTiles) != 0;
}

// The n-th sequence that has work, counted from 0, or -1. All lanes of a warp take part.
__device__ __forceinline__ int WorkingSeq(const uint32_t* working, int num_seqs, int n) {
  static_assert(kMaxPlanSeqs <= 32 * 32, "a lane has a word");
  const int lane = threadIdx.x % 32;
  uint32_t word = 32 * lane < num_seqs ? working[lane] : 0;
  int behind = __popc(word);  // sequences up to the end of the lane's word
  if (num_seqs > 32) {
#pragma unroll
    for (int step = 1; step < kMaxPlanSeqs / 32; step *= 2) {
      const int more = __shfl_up_sync(0xFFFFFFFFu, behind, step);
      if (lane >= step) behind += more;
    }
  }
  const uint32_t reached = __ballot_sync(0xFFFFFFFFu, 32 * lane < num_seqs && n < behind);
  if (reached == 0) return -1;
  const int holder = __ffs(reached) - 1;
  n -= __shfl_sync(0xFFFFFFFFu, behind - __popc(word), holder);
  word = __shfl_sync(0xFFFFFFFFu, word, holder);
  const bool found = (word >> lane & 1) != 0 && __popc(word & ((1u << lane) - 1)) == n;
  return 32 * holder + __ffs(__ballot_sync(0xFFFFFFFFu, found)) - 1;
}

// The work tiles of a task lie one behind the other on an axis of costs. A split work tile of n KV
// tiles costs kWorkTileCost + n: what is in front stands for its work apart from the keys. A whole
// work tile costs one.
__device__ __forceinline__ uint32_t CostOf(const AttentionTask& task, const SeqWork& work) {
  return task.split ? work.kv_tiles + kWorkTileCost : 1;
}

// The cost and the work tiles before each sequence of the task, in shared memory, and the CTA's
// share.
struct Schedule {
  const uint2* before;  // [num_seqs + 1]: cost, work tiles
  uint32_t begin;       // cost; a share never begins or ends inside a kWorkTileCost
  uint32_t end;
  uint32_t share;            // of every CTA but the last, before that rule; 0: of a cluster
  uint32_t first_work_tile;  // of the CTA
  uint32_t num_work_tiles;
  int first_seq;  // that hold them
  int last_seq;

  __device__ __forceinline__ bool InCluster() const { return share == 0; }
};

// Sequence of the task that holds a point of the cost axis: the last one that begins at or before
// it. All lanes of a warp take part: 2 rounds for up to 1024 sequences.
__device__ __forceinline__ int SeqAt(const uint2* before, int num_seqs, uint32_t cost) {
  const int lane = threadIdx.x % 32;
  int low = 0, size = num_seqs;
  while (size > 1) {
    const int step = (size + 31) / 32;
    const int candidate = lane * step;
    const bool begins = candidate < size && before[low + candidate].x <= cost;
    const int last = 31 - __clz(__ballot_sync(0xFFFFFFFFu, begins));
    low += last * step;
    size = min(step, size - last * step);
  }
  return low;
}

// A work tile, or the split of its keys that a CTA works on.
struct alignas(16) Segment {
  SeqShape shape;
  int batch_idx;
  int head;
  int tile;
  int kv_tile_begin;  // KV tiles, without those that the work tile cannot see
  int kv_tile_end;
  KeyRange<int> seen_by_all;  // keys that all packed rows see
  KeyRange<int> seen_by_any;  // keys that any packed row may see
  int packed_rows_differ;     // in what they see
  int begins_work_tile;       // no other CTA has KV tiles before these, or after them
  int ends_work_tile;
  int num_splits;  // CTAs with equal shares that have some of the work tile, 0: this one alone
  int first_cta;   // of them

  __device__ __forceinline__ bool Whole() const { return begins_work_tile && ends_work_tile; }
};

// Intersects what the packed rows of a work tile see with the mask offsets of its queries, [first,
// last] of the sequence, of which there is at least one.
__device__ __forceinline__ void IntersectMasks(const AttentionParams& p, int first, int last,
                                               Segment* s) {
  const int* masks = p.mask_offsets + 2 * static_cast<int64_t>(s->shape.q_begin + first);
  KeyRange<int> any = {kMaxKeys, 0}, all = {0, kMaxKeys};
#pragma unroll 4
  for (int i = 0; i <= last - first; ++i) {
    const int begin = __ldg(masks + 2 * i), end = __ldg(masks + 2 * i + 1);
    any = {min(any.begin, begin), max(any.end, end)};
    all = {max(all.begin, begin), min(all.end, end)};
  }
  s->seen_by_any = Intersect(s->seen_by_any, any);
  s->seen_by_any.begin = min(s->seen_by_any.begin, s->seen_by_any.end);
  s->seen_by_all = Intersect(s->seen_by_all, all);
}

// Narrows what all packed rows of a work tile see, and any of them, where they may have holes. Its
// queries are [first, last] of the sequence.
__device__ __forceinline__ void TakeHolesOfTile(const AttentionParams& p, int first, int last,
                                                Segment* s) {
  const int new_begin = s->shape.k_len - s->shape.q_len;
  const HeadWindow window = p.WindowOf(s->head);
  TakeHeadWindow(window, new_begin + first, kMaxKeys, &s->seen_by_any);
  const KeyRange<int> gap = TakeHeadWindow(window, new_begin + last, kMaxKeys, &s->seen_by_all);
  if (gap.begin < gap.end) {
    s->seen_by_all.begin = max(s->seen_by_all.begin, gap.end);
    s->packed_rows_differ = 1;  // from the interval of all
  }
  if (p.tree.data != nullptr && s->shape.q_len <= p.tree.size) {
    s->seen_by_all.end = min(s->seen_by_all.end, new_begin);
    s->packed_rows_differ = 1;
  }
}

// Sets what the packed rows of a work tile see. kGeneral: they may have holes in it.
template <int kTileRows, bool kGeneral = false>
__device__ __forceinline__ void SetVisibleKeys(const AttentionParams& p, const AttentionTask& task,
                                               Segment* s) {
  const int first = s->tile * kTileRows / task.group;
  const int last = min((s->tile * kTileRows + kTileRows - 1) / task.group, s->shape.q_len - 1);
  const KeyRange<int> low = KeysOfQuery(p, s->shape, first), high = KeysOfQuery(p, s->shape, last);
  s->seen_by_any = {min(low.begin, high.end), high.end};
  s->seen_by_all = {high.begin, low.end};
  if (p.mask_offsets != nullptr) IntersectMasks(p, first, last, s);
  s->packed_rows_differ = first != last;
  if constexpr (kGeneral) TakeHolesOfTile(p, first, last, s);
}

// The CTA's segment of a work tile.
template <int kTileRows, int kKvTile, bool kGeneral = false>
__device__ __forceinline__ Segment MakeSegment(const AttentionParams& p, const AttentionTask& task,
                                               const Schedule& schedule, uint32_t work_tile) {
  int seq = schedule.first_seq;
  while (seq < schedule.last_seq && schedule.before[seq + 1].y <= work_tile) ++seq;
  Segment s;
  s.batch_idx = task.first_seq + seq;
  s.shape = LoadSeqShape(p, s.batch_idx);
  const SeqWork work = WorkOf<kTileRows, kKvTile>(p, task, s.shape);
  const uint2 before = schedule.before[seq];
  const uint32_t length = CostOf(task, work);
  const uint32_t index = work_tile - before.y;
  const uint32_t cost = before.x + index * length;
  const uint32_t begin = max(cost, schedule.begin) - cost;
  const uint32_t end = min(cost + length, schedule.end) - cost;
  s.head = index / work.tiles;
  s.tile = index - s.head * work.tiles;
  if (!task.split) s.tile = work.tiles - 1 - s.tile;  // longest first with a causal mask
  s.begins_work_tile = begin == 0;
  s.ends_work_tile = end == length;
  // CTA i begins at i * share, or a little before, where that lies in a kWorkTileCost.
  s.num_splits = s.first_cta = 0;
  if (!s.Whole()) {
    s.first_cta = static_cast<int>((cost + kWorkTileCost) / schedule.share);
    s.num_splits = static_cast<int>((cost + length - 1) / schedule.share) - s.first_cta + 1;
  }
  SetVisibleKeys<kTileRows, kGeneral>(p, task, &s);
  const int kv_tiles_begin = task.split ? max(static_cast<int>(begin - kWorkTileCost), 0) : 0;
  const int kv_tiles_end = task.split ? static_cast<int>(end - kWorkTileCost) : work.kv_tiles;
  s.kv_tile_begin = max(work.first + kv_tiles_begin, s.seen_by_any.begin / kKvTile);
  s.kv_tile_end = max(min(work.first + kv_tiles_end, (s.seen_by_any.end + kKvTile - 1) / kKvTile),
                      s.kv_tile_begin);
  return s;
}

// A cluster takes the work tiles of one sequence and KV head one after the other. No other
// sequence's length counts. `working`: see ClustersTakeCall; null where each sequence has a
// cluster. The first thread says in *segment, which it alone writes, which sequence and head they
// are.
template <int kTileRows, int kKvTile>
__device__ __forceinline__ Schedule MakeClusterSchedule(const AttentionParams& p,
                                                        const AttentionTask& task,
                                                        const uint32_t* working, Segment* segment) {
  const int pair = blockIdx.x / task.cluster;
  int seq = pair / p.num_kv_heads;  // counts those that have work, where some have none
  const int head = pair - seq * p.num_kv_heads;
  Schedule schedule = {};
  if (working != nullptr) seq = WorkingSeq(working, task.num_seqs, seq);
  if (seq < 0 || seq >= task.num_seqs) return schedule;  // a CTA that only equal shares need
  seq += task.first_seq;
  const SeqShape shape = LoadSeqShape(p, seq);
  if (threadIdx.x == 0) {
    segment->shape = shape;
    segment->batch_idx = seq;
    segment->head = head;
  }
  schedule.num_work_tiles = WorkOf<kTileRows, kKvTile>(p, task, shape).tiles;
  return schedule;
}

// Completes the segment for the split of work tile `tile` that this CTA of the cluster has.
template <int kTileRows, int kKvTile, bool kGeneral = false>
__device__ __forceinline__ void SetClusterSegment(const AttentionParams& p,
                                                  const AttentionTask& task, uint32_t tile,
                                                  Segment* segment) {
  const int rank = static_cast<int>(ClusterRank());
  Segment s = *segment;
  s.tile = static_cast<int>(tile);
  s.begins_work_tile = s.ends_work_tile = false;
  s.num_splits = s.first_cta = 0;
  SetVisibleKeys<kTileRows, kGeneral>(p, task, &s);
  const int first = s.seen_by_any.begin / kKvTile;
  const int kv_tiles = max((s.seen_by_any.end + kKvTile - 1) / kKvTile - first, 0);
  const int each = kv_tiles / task.cluster, more = kv_tiles - each * task.cluster;
  s.kv_tile_begin = first + rank * each + min(rank, more);
  s.kv_tile_end = s.kv_tile_begin + each + (rank < more);
  *segment = s;
}

// Where a share begins or ends, the sequence and the work tile there, and whether that is inside
// the work tile.
struct ShareEdge {
  uint32_t cost;
  uint32_t work_tile;
  int seq;
  bool inside;
};

__device__ __forceinline__ ShareEdge EdgeAt(const AttentionTask& task, const uint2* before,
                                            uint64_t cost) {
  const uint2 all = before[task.num_seqs];
  if (cost >= all.x) return {all.x, all.y, task.num_seqs - 1, false};
  const uint32_t at = static_cast<uint32_t>(cost);
  const int seq = SeqAt(before, task.num_seqs, at);
  const uint2 start = before[seq], next = before[seq + 1];
  const uint32_t length = (next.x - start.x) / (next.y - start.y);
  const uint32_t index = (at - start.x) / length;
  const uint32_t offset = at - start.x - index * length;
  const bool inside = task.split && offset > kWorkTileCost;
  return {inside ? at : at - offset, start.y + index, seq, inside};
}

// Costs are counted up to here: garbage lengths must not wrap around.
inline constexpr uint32_t kMostCost = 0x7FFFFFFF;

// Fills before[0 .. num_seqs] from the cost and the work tiles of each sequence, which `work_of`
// tells, and returns the sums over all. All threads take part.
template <int kThreads, typename WorkOfSeq>
__device__ __forceinline__ uint2 SumWork(const int& num_seqs, uint2* before, uint2* warp_totals,
                                         WorkOfSeq&& work_of) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint2 sum_before = make_uint2(0, 0);
  if (threadIdx.x == 0) before[0] = sum_before;
  for (int base = 0; base < num_seqs; base += kThreads) {
    const int seq = base + static_cast<int>(threadIdx.x);
    uint2 sum = make_uint2(0, 0);
    if (seq < num_seqs) work_of(seq, &sum);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t x = __shfl_up_sync(0xFFFFFFFFu, sum.x, step);
      const uint32_t y = __shfl_up_sync(0xFFFFFFFFu, sum.y, step);
      if (lane >= step) sum.x = min(sum.x + x, kMostCost), sum.y += y;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    uint2 total = sum_before;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) sum_before = total;
      total.x = min(total.x + warp_totals[w].x, kMostCost);
      total.y += warp_totals[w].y;
    }
    if (seq < num_seqs) {
      before[seq + 1] = make_uint2(min(sum_before.x + sum.x, kMostCost), sum_before.y + sum.y);
    }
    sum_before = total;
    __syncthreads();
  }
  return sum_before;
}

// Adds a sequence's cost and work tiles. One that does not fit is left out, with both.
__device__ __forceinline__ void CountWork(uint64_t cost, uint64_t work_tiles, uint2* sum) {
  if (cost < kMostCost / 2) *sum = make_uint2(cost, work_tiles);
}

// Fills before[0 .. num_seqs] and returns the CTA's share of the work. All threads take part.
template <int kTileRows, int kKvTile, int kThreads>
__device__ __forceinline__ Schedule MakeSchedule(const AttentionParams& p,
                                                 const AttentionTask& task, uint2* before,
                                                 uint2* warp_totals) {
  const auto work_of = [&](int seq, uint2* sum) {
    const SeqWork work = WorkOf<kTileRows, kKvTile>(p, task, LoadSeqShape(p, task.first_seq + seq));
    const uint64_t work_tiles = static_cast<uint64_t>(work.tiles) * p.num_kv_heads;
    CountWork(work_tiles * CostOf(task, work), work_tiles, sum);
  };
  const uint2 all = SumWork<kThreads>(task.num_seqs, before, warp_totals, work_of);
  Schedule schedule;
  schedule.before = before;
  const uint32_t shares = task.shares;
  schedule.share = max((all.x + shares - 1) / shares, 1u);
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * schedule.share;
  const ShareEdge begin = EdgeAt(task, before, first);
  const ShareEdge end = EdgeAt(task, before, first + schedule.share);
  schedule.begin = begin.cost;
  schedule.end = end.cost;
  schedule.first_work_tile = begin.work_tile;
  schedule.num_work_tiles =
      begin.cost < end.cost ? end.work_tile + end.inside - begin.work_tile : 0;
  schedule.first_seq = begin.seq;
  schedule.last_seq = end.seq;
  // More cost than can be counted comes from lengths that no call has.
  if (all.x >= kMostCost) schedule.num_work_tiles = 0;
  return schedule;
}

}  // namespace fastattn::cuda
