// Which (row, KV head, tile of queries) and which of its keys a CTA works on, found on the device.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cuda/attention/launch.h"
#include "params/attention.h"

namespace fastattn::cuda {

// Positions stay below this, so that a window may be added to one.
inline constexpr int kMaxKeys = 1 << 30;

// Lengths of a row, cut to the tensors: nothing that the metadata says is trusted.
struct RowShape {
  int q_begin;      // first token of the row in q
  int q_len;        // its new tokens
  int k_len;        // its keys, the new tokens' included
  int k_limit;      // keys that can be addressed
  int64_t k_begin;  // packed: first key
};

__device__ __forceinline__ RowShape LoadRowShape(const AttentionParams& p, int b) {
  RowShape row;
  const SeqMeta& seqs = p.seqs;
  const int q_begin = __ldg(seqs.cu_seqlens_q + b), q_end = __ldg(seqs.cu_seqlens_q + b + 1);
  row.q_begin = min(max(q_begin, 0), seqs.num_tokens);
  row.q_len = min(max(q_end, row.q_begin), seqs.num_tokens) - row.q_begin;
  if (p.paged) {
    row.q_len = min(max(__ldg(seqs.seq_lens_this_time + b), 0), row.q_len);
    row.k_len = min(max(__ldg(seqs.seq_lens_decoder + b), 0), kMaxKeys - row.q_len) + row.q_len;
    row.k_limit = min(row.k_len, min(seqs.max_blocks, kMaxKeys / kBlockSize) * kBlockSize);
    row.k_begin = 0;
  } else {
    const int last = static_cast<int>(min(p.ragged.num_tokens, static_cast<int64_t>(kMaxKeys)));
    const int k_begin = min(max(__ldg(p.ragged.cu_seqlens_k + b), 0), last);
    row.k_len = min(max(__ldg(p.ragged.cu_seqlens_k + b + 1), k_begin), last) - k_begin;
    row.k_limit = row.k_len;
    row.k_begin = k_begin;
  }
  return row;
}

// Keys [begin, end).
struct KeyRange {
  int begin;
  int end;
};

// Keys that query `index` of a row sees by causal mask and window.
__device__ __forceinline__ KeyRange VisibleKeys(const AttentionParams& p, const RowShape& row,
                                                int index) {
  const int position = index + row.k_len - row.q_len;
  KeyRange keys{0, row.k_limit};
  if (p.causal) keys.end = min(keys.end, position + 1);
  if (p.window_right >= 0) {
    keys.end = min(keys.end, position + 1 + min(p.window_right, kMaxKeys - 1));
  }
  if (p.window_left >= 0) keys.begin = max(keys.begin, position - min(p.window_left, kMaxKeys));
  keys.end = max(keys.end, 0);
  keys.begin = min(keys.begin, keys.end);
  return keys;
}

// Work of a row: `tiles` tiles of queries for each KV head, each over the units [first, first +
// units) of the row's keys. A tile may see fewer of them.
struct RowWork {
  int tiles;
  int first;
  int units;
};

template <int kColumns, int kUnit>
__device__ __forceinline__ RowWork WorkOf(const AttentionParams& p, const AttentionTask& task,
                                          const RowShape& row) {
  const int pairs = row.q_len * task.group;
  if (pairs == 0 || pairs < task.min_pairs || pairs > task.max_pairs) return {0, 0, 0};
  const int first = VisibleKeys(p, row, 0).begin / kUnit;
  const int end = VisibleKeys(p, row, row.q_len - 1).end;
  // A row that sees nothing still has its output to write.
  const int units = max((end + kUnit - 1) / kUnit - first, 1);
  return {(pairs + kColumns - 1) / kColumns, first, units};
}

// The work of a task in one row of places. A split item of n units has kItemCost + n of them: those
// in front stand for what an item costs beside its keys. A whole item has one.
inline constexpr uint32_t kItemCost = 6;

__device__ __forceinline__ uint32_t PlacesOf(const AttentionTask& task, const RowWork& work) {
  return task.split ? work.units + kItemCost : 1;
}

// The places and the items before each row of the task, in shared memory, and the CTA's share.
struct Schedule {
  const uint2* before;  // [rows + 1]: places, items
  uint32_t begin;       // places; a share never begins or ends inside an item's cost
  uint32_t end;
  uint32_t share;       // of every CTA but the last, before that rule
  uint32_t first_item;  // of the CTA
  uint32_t num_items;
  int first_row;  // that hold them
  int last_row;
};

// Row of the task that holds a place: the last one that begins at or before it. All lanes of a warp
// take part: 2 rounds for up to 1024 rows.
__device__ __forceinline__ int RowAt(const uint2* before, int num_rows, uint32_t place) {
  const int lane = threadIdx.x % 32;
  int low = 0, size = num_rows;
  while (size > 1) {
    const int step = (size + 31) / 32;
    const int candidate = lane * step;
    const bool begins = candidate < size && before[low + candidate].x <= place;
    const int last = 31 - __clz(__ballot_sync(0xFFFFFFFFu, begins));
    low += last * step;
    size = min(step, size - last * step);
  }
  return low;
}

// One item (row, KV head, tile of queries), or a part of it, as a CTA works on it.
struct alignas(16) Segment {
  RowShape shape;
  int row;  // of the step
  int head;
  int tile;
  int unit_begin;  // units of keys, those that the tile cannot see left out
  int unit_end;
  KeyRange full;    // keys that all columns see
  KeyRange any;     // keys that any column may see
  int divided;      // columns differ in what they see
  int begins_item;  // no other CTA has the item's units before these, or after them
  int ends_item;
  int parts;  // CTAs that share an item which begins here and does not end, else 0

  __device__ __forceinline__ bool Whole() const { return begins_item && ends_item; }
};

// What the columns of a tile see.
template <int kColumns>
__device__ __forceinline__ void SetSight(const AttentionParams& p, const AttentionTask& task,
                                         Segment* s) {
  const int first = s->tile * kColumns / task.group;
  const int last = min((s->tile * kColumns + kColumns - 1) / task.group, s->shape.q_len - 1);
  const KeyRange low = VisibleKeys(p, s->shape, first), high = VisibleKeys(p, s->shape, last);
  s->any = {min(low.begin, high.end), high.end};
  s->full = {high.begin, low.end};
  if (p.mask_offsets != nullptr) s->full = {0, 0};
  s->divided = first != last || p.mask_offsets != nullptr;
}

// The CTA's segment of an item.
template <int kColumns, int kUnit>
__device__ __forceinline__ Segment MakeSegment(const AttentionParams& p, const AttentionTask& task,
                                               const Schedule& schedule, uint32_t item) {
  int row = schedule.first_row;
  while (row < schedule.last_row && schedule.before[row + 1].y <= item) ++row;
  Segment s;
  s.row = task.first_row + row;
  s.shape = LoadRowShape(p, s.row);
  const RowWork work = WorkOf<kColumns, kUnit>(p, task, s.shape);
  const uint2 before = schedule.before[row];
  const uint32_t length = PlacesOf(task, work);
  const uint32_t index = item - before.y;
  const uint32_t place = before.x + index * length;
  const uint32_t begin = max(place, schedule.begin) - place;
  const uint32_t end = min(place + length, schedule.end) - place;
  s.head = index / work.tiles;
  s.tile = index - s.head * work.tiles;
  if (!task.split) s.tile = work.tiles - 1 - s.tile;  // a causal row's longest tiles first
  s.begins_item = begin == 0;
  s.ends_item = end == length;
  // CTA i begins at i * share, or a little before, where that lies in an item's cost.
  s.parts =
      s.begins_item && !s.ends_item ? (place + length - 1) / schedule.share - blockIdx.x + 1 : 0;
  SetSight<kColumns>(p, task, &s);
  const int units_begin = task.split ? max(static_cast<int>(begin - kItemCost), 0) : 0;
  const int units_end = task.split ? static_cast<int>(end - kItemCost) : work.units;
  s.unit_begin = max(work.first + units_begin, s.any.begin / kUnit);
  s.unit_end = max(min(work.first + units_end, (s.any.end + kUnit - 1) / kUnit), s.unit_begin);
  return s;
}

// Clusters: each takes the tiles of one row and KV head in turn. No other row's length counts.
template <int kColumns, int kUnit>
__device__ __forceinline__ Schedule MakeClusterSchedule(const AttentionParams& p,
                                                        const AttentionTask& task, RowShape* row) {
  const int pair = blockIdx.x / task.cluster;
  Schedule schedule = {};
  schedule.first_row = schedule.last_row = pair / p.num_kv_heads;
  *row = LoadRowShape(p, task.first_row + schedule.first_row);
  schedule.num_items = WorkOf<kColumns, kUnit>(p, task, *row).tiles;
  return schedule;
}

// The share of tile `tile` that CTA `rank` of a cluster has.
template <int kColumns, int kUnit>
__device__ __forceinline__ Segment MakeClusterSegment(const AttentionParams& p,
                                                      const AttentionTask& task,
                                                      const Schedule& schedule, const RowShape& row,
                                                      uint32_t tile, int rank) {
  Segment s;
  s.shape = row;
  s.row = task.first_row + schedule.first_row;
  s.head = blockIdx.x / task.cluster - schedule.first_row * p.num_kv_heads;
  s.tile = static_cast<int>(tile);
  s.begins_item = s.ends_item = false;
  s.parts = 0;
  SetSight<kColumns>(p, task, &s);
  const int first = s.any.begin / kUnit;
  const int units = max((s.any.end + kUnit - 1) / kUnit - first, 0);
  const int each = units / task.cluster, more = units - each * task.cluster;
  s.unit_begin = first + rank * each + min(rank, more);
  s.unit_end = s.unit_begin + each + (rank < more);
  return s;
}

// Where a share begins or ends, the row and the item there, and whether that is inside the item.
struct ShareEdge {
  uint32_t place;
  uint32_t item;
  int row;
  bool inside;
};

__device__ __forceinline__ ShareEdge EdgeAt(const AttentionTask& task, const uint2* before,
                                            uint64_t place) {
  const uint2 all = before[task.num_rows];
  if (place >= all.x) return {all.x, all.y, task.num_rows - 1, false};
  const uint32_t at = static_cast<uint32_t>(place);
  const int row = RowAt(before, task.num_rows, at);
  const uint2 start = before[row], next = before[row + 1];
  const uint32_t length = (next.x - start.x) / (next.y - start.y);
  const uint32_t index = (at - start.x) / length;
  const uint32_t offset = at - start.x - index * length;
  const bool inside = task.split && offset > kItemCost;
  return {inside ? at : at - offset, start.y + index, row, inside};
}

// Fills before[0 .. rows] and returns the CTA's share of the work. All threads take part.
template <int kColumns, int kUnit, int kThreads>
__device__ __forceinline__ Schedule MakeSchedule(const AttentionParams& p,
                                                 const AttentionTask& task, uint2* before,
                                                 uint2* warp_totals) {
  constexpr int kWarps = kThreads / 32;
  constexpr uint32_t kMost = 0x7FFFFFFF;  // garbage lengths must not wrap around
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint2 sum_before = make_uint2(0, 0);
  if (threadIdx.x == 0) before[0] = sum_before;
  for (int base = 0; base < task.num_rows; base += kThreads) {
    const int row = base + threadIdx.x;
    uint2 sum = make_uint2(0, 0);
    if (row < task.num_rows) {
      const RowWork work = WorkOf<kColumns, kUnit>(p, task, LoadRowShape(p, task.first_row + row));
      const uint64_t items = static_cast<uint64_t>(work.tiles) * p.num_kv_heads;
      const uint64_t places = items * PlacesOf(task, work);
      // A row that does not fit is left out, places and items alike.
      if (places < kMost / 2) sum = make_uint2(places, items);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t x = __shfl_up_sync(0xFFFFFFFFu, sum.x, step);
      const uint32_t y = __shfl_up_sync(0xFFFFFFFFu, sum.y, step);
      if (lane >= step) sum.x = min(sum.x + x, kMost), sum.y += y;
    }
    if (lane == 31) warp_totals[warp] = sum;
    __syncthreads();
    uint2 total = sum_before;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) sum_before = total;
      total.x = min(total.x + warp_totals[w].x, kMost);
      total.y += warp_totals[w].y;
    }
    if (row < task.num_rows) {
      before[row + 1] = make_uint2(min(sum_before.x + sum.x, kMost), sum_before.y + sum.y);
    }
    sum_before = total;
    __syncthreads();
  }
  Schedule schedule;
  schedule.before = before;
  schedule.share = max((sum_before.x + gridDim.x - 1) / gridDim.x, 1u);
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * schedule.share;
  const ShareEdge begin = EdgeAt(task, before, first);
  const ShareEdge end = EdgeAt(task, before, first + schedule.share);
  schedule.begin = begin.place;
  schedule.end = end.place;
  schedule.first_item = begin.item;
  schedule.num_items = begin.place < end.place ? end.item + end.inside - begin.item : 0;
  schedule.first_row = begin.row;
  schedule.last_row = end.row;
  // More places than can be counted: lengths that no step has.
  if (sum_before.x >= kMost) schedule.num_items = 0;
  return schedule;
}

}  // namespace fastattn::cuda
