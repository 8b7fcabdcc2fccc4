// The launches of a call whose bits must not depend on what else is in the batch, nor, with
// split_invariant, on how a sequence was cut into steps.
//
// A sequence's keys are cut into splits at fixed positions, counted from key 0, and a split into
// four chains. A warp pipeline accumulates one chain; the results of a split's chains are added up
// in their order, and those of the splits after that. So a query's bits follow from the keys that
// it sees: not from the tile that it is in, nor from which CTA has which splits, which the plan and
// the device decide freely.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "common/types.h"
#include "plan/attention_plan.h"
#include "plan/limits.h"

namespace fastattn {

inline constexpr int kChainsOfSplit = 4;

struct KeySplit {
  uint32_t begin;  // key
  uint32_t keys;
};

FASTATTN_HD constexpr KeySplit KeySplitAt(int split) {
  if (split < kFirstSplits) {
    return {static_cast<uint32_t>(split) * kFirstSplitKeys, kFirstSplitKeys};
  }
  const int size = (split - kFirstSplits) / kSplitsOfSize;
  const uint32_t all = static_cast<uint32_t>(kFirstSplits * kFirstSplitKeys) << (2 * size);
  const uint32_t keys = all / 4;
  return {all + (split - kFirstSplits) % kSplitsOfSize * keys, keys};
}

// The split that has a key.
FASTATTN_HD constexpr int KeySplitOf(uint32_t key) {
  uint32_t all = kFirstSplits * kFirstSplitKeys;
  if (key < all) return static_cast<int>(key / kFirstSplitKeys);
  int first = kFirstSplits;
  for (; key / 4 >= all; all *= 4) first += kSplitsOfSize;
  return first + static_cast<int>((key - all) / (all / 4));
}

// Cost of a work tile beside its keys, in quarters of a KV tile, and the costs of a launch that its
// CTAs share by splits. The device adds costs up in 32 bits.
inline constexpr int64_t kWorkTileQuarters = 24;
inline constexpr int64_t kMostSharedCost = int64_t{1} << 29;

// Floats of the workspace: of each of `grid` CTAs the total of the work tile that it is at, and of
// its current split; of each of `shares` CTAs a header, and a result for each of the `most_splits`
// splits of a work tile that it may find begun.
inline int64_t InvariantFloats(int64_t grid, int64_t shares, int64_t most_splits, int64_t tile_rows,
                               int64_t head_dim) {
  return shares * kPartialHeader + (2 * grid + shares * most_splits) * tile_rows * (head_dim + 2);
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
  const int64_t most_keys = std::clamp<int64_t>(s.max_seqlen_k, 1, int64_t{1} << 30);
  // A sequence of more keys than max_seqlen_k says has the rest of them in its last split.
  launch.invariant_splits = KeySplitOf(static_cast<uint32_t>(most_keys - 1)) + 1;
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t longest = std::max<int64_t>(std::min(s.max_seqlen_q, s.num_tokens), 1);
  const int64_t tiles =
      std::min(s.batch * CeilDiv(std::min(longest * group, max_packed_rows), int64_t{tile_rows}),
               CeilDiv(s.num_tokens * group, int64_t{tile_rows}) + s.batch) *
      s.num_kv_heads;
  const int64_t ctas = s.num_sms * s.tile->ctas_per_sm;
  const int64_t kv_tiles = CeilDiv(most_keys, keys);
  // A call of few keys whose work tiles fill most of the GPU: a second kernel would take longer
  // than half of a tile's keys.
  const bool few_keys = tile_rows < 64 && s.batch <= kMaxPlanSeqs && 4 * tiles >= 3 * s.num_sms &&
                        tiles <= ctas && tiles * kv_tiles <= kClusterKvTilesPerSm * s.num_sms;
  // So many work tiles need no splits, and the device could not count their keys.
  const bool many = tiles >= kMostSharedCost / (4 * kv_tiles + kWorkTileQuarters);
  launch.whole_tiles = few_keys || many;
  launch.grid = std::max<int64_t>(
      1, std::min(tiles * (launch.whole_tiles ? 1 : launch.invariant_splits), ctas));
  launch.shares = launch.grid;
  const int64_t head_dim = ValueDim(static_cast<int>(s.head_dim));
  if (!launch.whole_tiles) {
    const int64_t result = tile_rows * (head_dim + 2) * 4;
    const int64_t most = kInvariantBytes / (result * launch.invariant_splits);
    launch.shares = std::clamp<int64_t>(most, 1, launch.grid);
  }
  // Totals of 8 packed rows lie in registers, and so does a single split of four pipelines.
  const bool small =
      s.head_dim <= 128 && (tile_rows == 8 || (tile_rows == 16 && launch.invariant_splits == 1));
  if (!small || (launch.invariant_splits > 1 && !launch.whole_tiles)) {
    launch.workspace =
        InvariantFloats(launch.grid, launch.shares,
                        launch.whole_tiles ? 0 : launch.invariant_splits, tile_rows, head_dim);
  }
  return launch;
}

// Whether a launch of this plan leaves something for a second kernel.
inline bool LeavesInvariantPartials(const AttentionLaunch& launch) {
  return launch.grid > 1 && launch.invariant_splits > 1 && !launch.whole_tiles;
}

// As PlanAttention. Sequences of `long_seq` tokens and more take whole tiles of another kernel, but
// not in a call whose bits must not depend on how a sequence was cut into steps.
inline AttentionPlan PlanInvariantAttention(const AttentionSizes& s, bool split_invariant) {
  AttentionPlan plan;
  if (s.num_tokens <= 0 || s.batch <= 0 || s.num_kv_heads <= 0 || s.num_heads <= 0) return plan;
  const int64_t group = s.num_heads / s.num_kv_heads;
  const int64_t longest = std::max<int64_t>(std::min(s.max_seqlen_q, s.num_tokens), 1);
  const int64_t long_seq = split_invariant ? kAllPackedRows : s.long_seq;
  int64_t done = 0;  // packed rows that launches so far take
  for (const int tile_rows : {8, 16, 64}) {
    const int64_t most = tile_rows == 64 ? long_seq * group - 1 : tile_rows;
    // No sequence has as many packed rows, or only longer ones than the host says there are.
    const int64_t first = done / group + 1;  // tokens of the shortest sequence that is left
    if (first * group > most || first > longest) continue;
    plan.launches[plan.num_launches++] =
        InvariantLaunch(s, tile_rows, done + 1, std::min(most, kAllPackedRows));
    done = most;
  }
  if (longest >= long_seq) {
    plan.launches[plan.num_launches++] = WholeLaunch(s, done + 1);
  } else {
    plan.launches[plan.num_launches - 1].max_packed_rows = kAllPackedRows;
  }
  for (int i = 0; i < plan.num_launches; ++i) plan.workspace += plan.launches[i].workspace;
  return plan;
}

}  // namespace fastattn
