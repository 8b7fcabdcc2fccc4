// The launches of a batch-invariant call: a sequence's bits follow from the sequence alone, from
// its new tokens and its keys, beside head counts, types and the GPU's architecture.
//
//  - A sequence's class, which is its tile and its kernel, follows from its number of new tokens.
//    Each class has a launch of its own, and a launch is left out only where max_seqlen_q says that
//    its class is empty.
//  - The keys of a work tile are cut into splits by their own number (InvariantSplitsOf), and the
//    splits' results are added up one after the other, whichever CTAs they come from. A CTA takes
//    any number of neighbouring splits, so that what the batch is, and how many multiprocessors
//    there are, decides who works on what and moves no bit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/types.h"
#include "plan/attention_plan.h"

namespace fastattn {

// KV tiles that the warp pipelines of every work tile take evenly: a split's number of them is a
// multiple.
inline constexpr int kInvariantStep = 4;

// Bounds of a work tile's splits.
struct InvariantBounds {
  int most_splits;
  int least_tiles;  // KV tiles of a split, where there are several
};

// With 8 KV heads, 16 splits of one sequence give work to 128 CTAs (limits.h). Tiles of 64 packed
// rows begin to be as many as that by themselves, and their results are eight times as large.
FASTATTN_HD constexpr InvariantBounds InvariantBoundsOf(int tile_rows, int num_kv_heads) {
  const int most = num_kv_heads >= 8 ? kInvariantSplits : kInvariantSplitsFewHeads;
  return tile_rows == 64 ? InvariantBounds{most / 4, kInvariantLeastTilesOf64}
                         : InvariantBounds{most, kInvariantLeastTiles};
}

// Splits of a sequence's work tiles: `count` of them at most, each but the last of `tiles` KV
// tiles.
struct InvariantSplits {
  int tiles;
  int count;
};

// `kv_tiles` is at least 1, and below 2^30.
FASTATTN_HD constexpr InvariantSplits InvariantSplitsOf(int kv_tiles, int most_splits,
                                                        int least_tiles) {
  int wanted = kv_tiles / least_tiles;
  if (wanted > most_splits) wanted = most_splits;
  if (wanted < 1) wanted = 1;
  const int tiles =
      (kv_tiles + wanted * kInvariantStep - 1) / (wanted * kInvariantStep) * kInvariantStep;
  return {tiles, (kv_tiles + tiles - 1) / tiles};
}

// Floats of the workspace of `grid` CTAs. Each has a header, a result for every split but the first
// of the work tile that it found begun, and the total of the work tile that it is at.
inline int64_t InvariantFloats(int64_t grid, int64_t most_splits, int64_t tile_rows,
                               int64_t head_dim) {
  return grid * (kPartialHeader + most_splits * tile_rows * (head_dim + 2));
}

// The launch of the sequences with min_packed_rows to max_packed_rows a KV head.
inline AttentionLaunch InvariantLaunch(const AttentionSizes& s, int tile_rows,
                                       int64_t min_packed_rows, int64_t max_packed_rows) {
  AttentionLaunch launch;
  launch.tile_rows = tile_rows;
  launch.split = true;
  launch.min_packed_rows = min_packed_rows;
  launch.max_packed_rows = max_packed_rows;
  const int64_t keys =
      s.tile->keys(static_cast<int>(s.head_dim), static_cast<int>(s.element_bytes));
  const int64_t kv_tiles = CeilDiv(std::max<int64_t>(s.max_seqlen_k, 1), keys);
  const InvariantBounds bounds =
      InvariantBoundsOf(tile_rows, static_cast<int>(std::min<int64_t>(s.num_kv_heads, 8)));
  // A sequence of more keys than max_seqlen_k says is cut into no more splits than have room.
  launch.invariant_splits =
      std::clamp<int64_t>(kv_tiles / bounds.least_tiles, 1, bounds.most_splits);
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t longest = std::max<int64_t>(std::min(s.max_seqlen_q, s.num_tokens), 1);
  const int64_t tiles =
      s.batch * s.num_kv_heads * CeilDiv(std::min(longest * group, max_packed_rows), tile_rows);
  const int64_t ctas = s.num_sms * s.tile->ctas_per_sm;
  // A call of few keys whose work tiles fill most of the GPU: a second kernel would take longer
  // than half of a tile's keys.
  launch.whole_tiles = tile_rows < 64 && s.batch <= kMaxPlanSeqs && 4 * tiles >= 3 * s.num_sms &&
                       tiles <= ctas && tiles * kv_tiles <= kClusterKvTilesPerSm * s.num_sms;
  launch.grid = std::max<int64_t>(
      1, std::min(tiles * (launch.whole_tiles ? 1 : launch.invariant_splits), ctas));
  launch.shares = launch.grid;
  // A single split needs no room, and neither does a tile of 8 packed rows that is never cut: its
  // total lies in registers.
  if (launch.invariant_splits > 1 && !(launch.whole_tiles && tile_rows == 8)) {
    launch.workspace = InvariantFloats(launch.grid, launch.invariant_splits, tile_rows, s.head_dim);
  }
  return launch;
}

// Whether a launch of this plan leaves something for a second kernel.
inline bool LeavesInvariantPartials(const AttentionLaunch& launch) {
  return launch.grid > 1 && launch.workspace > 0 && !launch.whole_tiles;
}

// As PlanAttention. Sequences of `long_seq` tokens and more take whole tiles.
inline AttentionPlan PlanInvariantAttention(const AttentionSizes& s) {
  AttentionPlan plan;
  if (s.num_tokens <= 0 || s.batch <= 0 || s.num_kv_heads <= 0 || s.num_heads <= 0) return plan;
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t longest = std::max<int64_t>(std::min(s.max_seqlen_q, s.num_tokens), 1);
  int64_t done = 0;  // packed rows that launches so far take
  for (const int tile_rows : {8, 16, 64}) {
    const int64_t most = tile_rows == 64 ? s.long_seq * group - 1 : tile_rows;
    // No sequence has as many packed rows, or only longer ones than the host says there are.
    const int64_t first = done / group + 1;  // tokens of the shortest sequence that is left
    if (first * group > most || first > longest) continue;
    plan.launches[plan.num_launches++] = InvariantLaunch(s, tile_rows, done + 1, most);
    done = most;
  }
  if (longest >= s.long_seq) {
    plan.launches[plan.num_launches++] = WholeLaunch(s, done + 1);
  } else {
    plan.launches[plan.num_launches - 1].max_packed_rows = kAllPackedRows;
  }
  for (int i = 0; i < plan.num_launches; ++i) plan.workspace += plan.launches[i].workspace;
  return plan;
}

}  // namespace fastattn
