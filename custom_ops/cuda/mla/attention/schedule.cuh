// Which CTA takes which rows and keys. Lengths are on the device, so that every CTA finds its own
// share: all items' work, one after the other, is cut into equal ranges, one for each group of
// CTAs.
//
// An item is a group's rows of one sequence: group_ctas tiles of tile_rows rows. A row is a head of
// a new token. The item's work is its key tiles, and what it costs beside them. Where a range ends
// inside an item, the groups on both sides write partial results, which merge.cu merges.
#pragma once

#include <cstdint>

#include "common/seq_lengths.h"
#include "cuda/common/lane.cuh"
#include "params/mla_attention.h"
#include "plan/mla_attention.h"

namespace fastattn::cuda::mla_attention {

inline constexpr int kTileKeys = kMlaAttentionTileKeys;
// Work in units of a kUnit-th key tile. An item costs kItemTiles more than its tiles, and no group
// gets less than kLeastTiles.
inline constexpr int64_t kUnit = 16;
inline constexpr int kItemTiles = 2;
inline constexpr int kLeastTiles = 3;
// Splits this near to an item's ends are moved there.
inline constexpr int kSnapTiles = 2;

struct Seq {
  int q_begin = 0;         // first token of q
  int q_len = 0;           // new tokens
  int k_len = 0;           // keys
  int k_limit = 0;         // keys that the block table has
  int64_t items = 0;       // groups' rows
  int64_t first_work = 0;  // of item 0
  int64_t more_work = 0;   // of each item than of the one before

  // Work of the items before `item`.
  __device__ __forceinline__ int64_t WorkBefore(int64_t item) const {
    return item * first_work + more_work * (item * (item - 1) / 2);
  }
};

// Keys that a new token sees, unassigned ones among them.
__device__ __forceinline__ int VisibleKeys(const MlaAttentionParams& p, const Seq& seq, int token) {
  return min(p.causal ? seq.k_len - seq.q_len + token + 1 : seq.k_len, seq.k_limit);
}

// Key tiles that rows up to `last_row` (not included) see.
__device__ __forceinline__ int TilesBefore(const MlaAttentionParams& p, const Seq& seq,
                                           int64_t last_row) {
  const int rows = static_cast<int>(min(last_row, static_cast<int64_t>(seq.q_len * p.heads)));
  const int keys = VisibleKeys(p, seq, (rows - 1) / p.heads);
  return (keys + kTileKeys - 1) / kTileKeys;
}

__device__ __forceinline__ Seq LoadSeq(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                                       int b) {
  Seq seq;
  const SeqMeta& seqs = p.seqs;
  const int start = __ldg(seqs.cu_seqlens_q + b), end = __ldg(seqs.cu_seqlens_q + b + 1);
  const int count = __ldg(seqs.seq_lens_this_time + b), cached = __ldg(seqs.seq_lens_decoder + b);
  const TokenRange<int> tokens = RaggedTokens(start, end, seqs.num_tokens);
  seq.q_begin = tokens.begin;
  seq.q_len = NewTokens(count, tokens.count);
  if (seq.q_len == 0) return seq;
  seq.k_len = PagedKeys(cached, seq.q_len, kMaxKeys);
  seq.k_limit = static_cast<int>(min(static_cast<int64_t>(seq.k_len),
                                     static_cast<int64_t>(seqs.max_blocks) * p.cache.page_size));
  const int rows = plan.tile_rows * plan.group_ctas;
  seq.items = (static_cast<int64_t>(seq.q_len) * p.heads + rows - 1) / rows;
  const int first = TilesBefore(p, seq, rows);
  const int last = TilesBefore(p, seq, seq.items * rows);
  seq.first_work = kUnit * (first + kItemTiles);
  seq.more_work = seq.items > 1 ? kUnit * (last - first) / (seq.items - 1) : 0;
  return seq;
}

// A group's range of the work, and the sequence in which it begins.
struct Share {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t total = 0;
  int64_t seq_begin = 0;  // of that sequence's work
  int groups = 0;         // that have work
  int batch_idx = 0;
};

__device__ __forceinline__ int64_t RangeBegin(int64_t total, int groups, int group) {
  return total * group / groups;
}

// Inclusive sums over the CTA's threads, and of all of them. `sums` holds an entry a warp.
template <int kThreads>
__device__ __forceinline__ int64_t ScanThreads(int64_t x, int64_t* sums, int64_t* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, x, step);
    if (lane >= step) x += other;
  }
  __syncthreads();  // the entries of the scan before are no longer read
  if (lane == 31) sums[warp] = x;
  __syncthreads();
  *all = 0;
  int64_t before = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < warp ? sums[w] : 0;
    *all += sums[w];
  }
  return before + x;
}

// Fills *share, which lies in shared memory. All threads call it; a barrier follows it.
template <int kThreads>
__device__ __forceinline__ void FindShare(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                                          int group, int64_t* sums, Share* share) {
  const auto work_of = [&](int b) {
    if (b >= p.seqs.batch) return int64_t{0};
    const Seq seq = LoadSeq(p, plan, b);
    return seq.WorkBefore(seq.items);
  };
  int64_t total = 0, all = 0, work = 0, last = 0;  // last: work of the sequences up to this one
  for (int b = 0; b < p.seqs.batch; b += kThreads) {
    work = work_of(b + threadIdx.x);
    last = total + ScanThreads<kThreads>(work, sums, &all);
    total += all;
  }
  const int groups =
      static_cast<int>(max(min(static_cast<int64_t>(plan.groups), total / (kUnit * kLeastTiles)),
                           static_cast<int64_t>(1)));
  const int64_t begin = group < groups ? RangeBegin(total, groups, group) : total;
  const int64_t end = group < groups ? RangeBegin(total, groups, group + 1) : total;
  if (threadIdx.x == 0) {
    share->begin = begin;
    share->end = end;
    share->total = total;
    share->groups = groups;
  }
  if (begin >= end) return;
  const auto claim = [&](int b) {
    if (begin < last - work || begin >= last) return;
    share->batch_idx = b;
    share->seq_begin = last - work;
  };
  if (p.seqs.batch <= kThreads) {
    claim(threadIdx.x);
    return;
  }
  int64_t before = 0;
  for (int b = 0; b < p.seqs.batch; b += kThreads) {
    work = work_of(b + threadIdx.x);
    last = before + ScanThreads<kThreads>(work, sums, &all);
    claim(b + threadIdx.x);
    before += all;
  }
}

// Key tiles [begin, end) of the rows of one item.
struct Segment {
  Seq seq;
  int batch_idx;
  int64_t row;     // first of the group's rows, in the sequence
  int begin, end;  // key tiles
  int tiles;       // of the whole item
  int merged;      // groups behind this one that take up the item, if this one has its first tiles
};

// Walks over the segments of a group's share. All threads of a role walk alike; one role counts the
// groups behind.
template <bool kCounts>
class Walker {
 public:
  __device__ __forceinline__ Walker(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                                    const Share& share, int group)
      : p_(p),
        plan_(plan),
        at_(share.begin),
        end_(share.end),
        total_(share.total),
        seq_begin_(share.seq_begin),
        groups_(share.groups),
        group_(group),
        batch_idx_(share.batch_idx) {
    if (at_ < end_) {
      seq_ = LoadSeq(p, plan, batch_idx_);
      seq_work_ = seq_.WorkBefore(seq_.items);
    }
  }

  // False: there is no further segment.
  __device__ __forceinline__ bool Next(Segment* segment) {
    while (at_ < end_) {
      while (at_ >= seq_begin_ + seq_work_) {
        seq_begin_ += seq_work_;
        seq_ = LoadSeq(p_, plan_, ++batch_idx_);
        seq_work_ = seq_.WorkBefore(seq_.items);
        item_ = -1;
      }
      // A range begins anywhere, and then takes one item after the other.
      const int64_t item = at_ == seq_begin_ ? 0
                           : item_ < 0       ? FindItem(at_ - seq_begin_)
                                             : item_ + 1;
      item_ = item;
      const int64_t first = seq_begin_ + seq_.WorkBefore(item);
      const int64_t last = seq_begin_ + seq_.WorkBefore(item + 1);
      const int rows = plan_.tile_rows * plan_.group_ctas;
      const int tiles = TilesBefore(p_, seq_, (item + 1) * rows);
      const int begin = TileAt(at_, first, last, tiles);
      const int end = end_ >= last ? tiles : TileAt(end_, first, last, tiles);
      const bool starts = at_ == first;
      at_ = min(last, end_);
      const bool empty = begin >= end;
      const bool inside = begin > 0 && begin < tiles;
      if (empty && !(tiles == 0 && starts) && !inside) continue;
      segment->seq = seq_;
      segment->batch_idx = batch_idx_;
      segment->row = item * rows;
      segment->begin = begin;
      segment->end = end;
      segment->tiles = tiles;
      segment->merged = 0;
      if (kCounts && begin == 0 && end < tiles) segment->merged = CountBehind(first, last, tiles);
      return true;
    }
    return false;
  }

 private:
  // The item that holds a position of the sequence's work.
  __device__ __forceinline__ int64_t FindItem(int64_t position) const {
    int64_t low = 0, high = seq_.items;  // the item is in [low, high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (seq_.WorkBefore(middle) <= position) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The tile before which a range ends at `position`: the same for the groups on both sides.
  __device__ __forceinline__ static int TileAt(int64_t position, int64_t first, int64_t last,
                                               int tiles) {
    const int64_t extra = kUnit * kItemTiles, work = last - first - extra;
    const int64_t done = position - first - extra;
    if (done <= 0 || work <= 0) return 0;
    const int tile = static_cast<int>(min(done * tiles / work, static_cast<int64_t>(tiles)));
    if (tile < kSnapTiles) return 0;
    return tile > tiles - kSnapTiles ? tiles : tile;
  }

  // Groups behind this one whose ranges begin before `last`, but for those that begin at the item's
  // end as its tiles have it.
  __device__ __forceinline__ int CountBehind(int64_t first, int64_t last, int tiles) const {
    int end = static_cast<int>(
        min((last * groups_ + total_ - 1) / total_, static_cast<int64_t>(groups_)));
    while (end > group_ + 1 &&
           TileAt(RangeBegin(total_, groups_, end - 1), first, last, tiles) >= tiles) {
      --end;
    }
    return max(end - group_ - 1, 0);
  }

  const MlaAttentionParams& p_;
  const MlaAttentionPlan& plan_;
  int64_t at_, end_, total_, seq_begin_;
  int64_t seq_work_ = 0;
  int64_t item_ = -1;  // of the segment before
  int groups_, group_, batch_idx_;
  Seq seq_;
};

// Where a CTA's partial results lie: of an item that an earlier group began (`continued`), or of
// one that the next group goes on with.
__device__ __forceinline__ int64_t PartialSlot(int64_t cta, bool continued) {
  return 2 * cta + (continued ? 0 : 1);
}

struct Workspace {
  float* partial;  // [slots, tile_rows, 512], normalised
  float* lse;      // [slots, tile_rows], of base 2
  int* notes;      // [groups, kMlaAttentionNoteInts]
};

__host__ __device__ inline Workspace WorkspaceOf(const MlaAttentionParams& p,
                                                 const MlaAttentionPlan& plan) {
  const int64_t rows = int64_t{2} * plan.groups * plan.group_ctas * plan.tile_rows;
  float* lse = p.workspace + rows * kMlaAttentionChannels;
  return {p.workspace, lse, reinterpret_cast<int*>(lse + rows)};
}

// What a group notes for merge.cu about the item that it and groups behind it have parts of.
struct Note {
  int merged = 0;  // groups behind it; 0: there is no such item
  int q_begin = 0;
  int row = 0;   // first of the item's rows
  int rows = 0;  // of the sequence
};

__device__ __forceinline__ void WriteNote(const Workspace& workspace, int group, const Note& note) {
  *reinterpret_cast<int4*>(workspace.notes + group * kMlaAttentionNoteInts) =
      make_int4(note.merged, note.q_begin, note.row, note.rows);
}

}  // namespace fastattn::cuda::mla_attention
