// Which kernel takes a call of mla_attention on a GPU, and how it is shared out: pure functions of
// what the host knows.
//
// The rows of a sequence are its new tokens' heads, token by token. An item is a group's rows of
// one sequence; its keys may be split among neighbouring groups, whose partial results lie in the
// workspace (cuda/mla/attention/schedule.cuh shares the items out, on the device).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"
#include "params/mla_attention.h"
#include "plan/kernel_row.h"
#include "plan/limits.h"

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

// Keys of a tile of the sm_90 kernels, and rows of a CTA's tile of wgmma.cu and mma.cu.
inline constexpr int kMlaAttentionTileKeys = 64;
inline constexpr int kMlaAttentionWgmmaRows = 64;
inline constexpr int kMlaAttentionMmaRows = 16;

enum class MlaAttentionKernel : int { kNarrow, kWgmma, kMma };

struct MlaAttentionRow : KernelRow<MlaAttentionKernel, MlaAttentionParams> {
  int (*tile_rows)(const MlaAttentionParams&);  // of a CTA
  bool whole_group;                             // a group of CTAs has the rows of a tile only
  int ctas_per_processor;
};

namespace mla_attention_rows {

inline int64_t Rows(const MlaAttentionParams& p) { return int64_t{p.max_seqlen_q} * p.heads; }

inline Reason NarrowLacks(const MlaAttentionParams& p) {
  const MlaFormat format = p.cache.format;
  if (format != MlaFormat::kFp8 && format != MlaFormat::kFp8x656) {
    return "the cache has neither format fp8 nor fp8_656";
  }
  if (p.cache.num_pages <= 0 || Rows(p) <= 0) return "the call is empty";
  return Rows(p) <= kMlaNarrowRows ? nullptr : "new tokens times heads are more than 16";
}

// Tokens of a TMA box: those of a tile that lie in one page, whatever the tile.
inline int BoxRows(const MlaCache& cache) {
  const int lowest = cache.page_size & -cache.page_size;
  return std::min(lowest, kMlaAttentionTileKeys);
}

inline Reason WgmmaLacks(const MlaAttentionParams& p) {
  const MlaCache& cache = p.cache;
  if (cache.num_pages == 0) return "the cache is empty";
  if (cache.format == MlaFormat::kFp8x528) return "the cache has format fp8_528";
  if (cache.format != MlaFormat::kBf16) return nullptr;
  // A box is a whole number of swizzle patterns. Strides of a tensor map are not 0.
  const bool reads = BoxRows(cache) >= 8 && cache.row_stride > 0 && cache.page_stride > 0;
  return reads ? nullptr : "TMA cannot read the pages: page_size is no multiple of 8";
}

inline int NarrowTileRows(const MlaAttentionParams& p) {
  return static_cast<int>((Rows(p) + 7) / 8) * 8;
}
inline int WgmmaTileRows(const MlaAttentionParams&) { return kMlaAttentionWgmmaRows; }
inline int MmaTileRows(const MlaAttentionParams&) { return kMlaAttentionMmaRows; }

}  // namespace mla_attention_rows

inline constexpr MlaAttentionRow kMlaAttentionKernels[] = {
    {{MlaAttentionKernel::kNarrow, "mla/attention/narrow", kOnlySm90,
      mla_attention_rows::NarrowLacks},
     mla_attention_rows::NarrowTileRows,
     true,
     2},
    {{MlaAttentionKernel::kWgmma, "mla/attention/wgmma", kOnlySm90, mla_attention_rows::WgmmaLacks},
     mla_attention_rows::WgmmaTileRows,
     false,
     1},
    {{MlaAttentionKernel::kMma, "mla/attention/mma", kFromSm80, LacksNothing<MlaAttentionParams>},
     mla_attention_rows::MmaTileRows,
     false,
     2},
};

inline MlaAttentionPlan PlanMlaAttention(int64_t max_seqlen_q, int heads, int tile_rows,
                                         int processors, int ctas_per_processor) {
  const int64_t rows = std::max<int64_t>(max_seqlen_q, 1) * heads;
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  const int group = static_cast<int>(std::clamp<int64_t>(tiles, 1, 2));
  const int groups = std::clamp(processors * ctas_per_processor / group, 1, kMlaAttentionMaxGroups);
  return {tile_rows, group, groups};
}

struct MlaAttentionDecision {
  MlaAttentionKernel kernel;
  MlaAttentionPlan plan;
};

// `major` is of the compute capability.
inline MlaAttentionDecision DecideMlaAttention(const MlaAttentionParams& p, int major,
                                               int processors) {
  const MlaAttentionRow& row = ChooseKernel(kMlaAttentionKernels, p, major);
  const int tile_rows = row.tile_rows(p);
  const int64_t tokens = row.whole_group ? 1 : p.max_seqlen_q;
  const int heads = row.whole_group ? 1 : p.heads;
  return {row.kernel,
          PlanMlaAttention(tokens, heads, tile_rows, processors, row.ctas_per_processor)};
}

// Floats: two partial results a CTA, their LSEs, and the groups' notes.
inline int64_t MlaAttentionWorkspace(const MlaAttentionPlan& plan) {
  const int64_t slots = int64_t{2} * plan.groups * plan.group_ctas;
  return slots * plan.tile_rows * (kMlaAttentionChannels + 1) +
         int64_t{plan.groups} * kMlaAttentionNoteInts;
}

}  // namespace fastattn
