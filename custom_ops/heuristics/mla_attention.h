// How mla_attention is shared out on a GPU: a pure function of sizes that the host knows.
//
// The rows of a sequence are its new tokens' heads, token by token. An item is a group's rows of
// one sequence; its keys may be split among neighbouring groups, whose partial results lie in the
// workspace (cuda/mla/attention/schedule.cuh shares the items out, on the device).
#pragma once

#include <algorithm>
#include <cstdint>

#include "params/mla_attention.h"

namespace fastattn {

struct MlaAttentionPlan {
  int tile_rows;   // of a CTA
  int group_ctas;  // CTAs that take neighbouring rows and the same keys
  int groups;
};

inline constexpr int kMlaAttentionChannels = kMlaValueDim;
// Ints that a group writes about the item that it splits: see cuda/mla/attention/schedule.cuh.
inline constexpr int kMlaAttentionNoteInts = 8;

// So many threads merge partial results.
inline constexpr int kMlaAttentionMaxGroups = 512;

inline MlaAttentionPlan PlanMlaAttention(int64_t max_seqlen_q, int heads, int tile_rows,
                                         int processors, int ctas_per_processor) {
  const int64_t rows = std::max<int64_t>(max_seqlen_q, 1) * heads;
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const int group = static_cast<int>(std::clamp<int64_t>(tiles, 1, 2));
  const int groups = std::clamp(processors * ctas_per_processor / group, 1, kMlaAttentionMaxGroups);
  return {tile_rows, group, groups};
}

// Floats: two partial results a CTA, their LSEs, and the groups' notes.
inline int64_t MlaAttentionWorkspace(const MlaAttentionPlan& plan) {
  const int64_t slots = int64_t{2} * plan.groups * plan.group_ctas;
  return slots * plan.tile_rows * (kMlaAttentionChannels + 1) +
         int64_t{plan.groups} * kMlaAttentionNoteInts;
}

}  // namespace fastattn
