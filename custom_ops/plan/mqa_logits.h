// Which kernel takes a call of mqa_logits and paged_mqa_logits on a GPU: a pure function of what
// the host knows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params/mqa_logits.h"
#include "plan/kernel_row.h"

namespace fastattn {

enum class LogitsKernel : int { kWgmma, kMma };

using LogitsRow = KernelRow<LogitsKernel, LogitsParams>;

// Of the sm_90 kernel: channels, and keys of a tile.
inline constexpr int kLogitsDim = 128;
inline constexpr int kLogitsTileKeys = 64;

// Columns of its products, (query, head) each: as few as hold a step's queries.
inline int LogitsColumns(const LogitsParams& p) {
  if (!p.paged) return p.quant == IndexerQuant::kFp8 ? 256 : 128;
  return p.next_n * p.num_heads <= 64 ? 64 : 128;
}

// Groups of queries that a CTA scores together, and of those the groups of one sequence (paged).
inline int LogitsGroupsOfSequence(const LogitsParams& p, int rows) {
  return p.paged ? static_cast<int>((p.next_n + rows - 1) / rows) : 1;
}
inline int LogitsGroupCount(const LogitsParams& p, int rows) {
  return p.paged ? static_cast<int>(p.batch) * LogitsGroupsOfSequence(p, rows)
                 : static_cast<int>((p.rows + rows - 1) / rows);
}

namespace logits_rows {

inline bool Aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

inline constexpr Reason kUnreadable =
    "TMA cannot read an operand: it begins at no multiple of 16 bytes";
inline constexpr Reason kTooMany = "there are too many queries or keys for 32-bit coordinates";

inline Reason WgmmaLacks(const LogitsParams& p) {
  if (p.head_dim != kLogitsDim) return "heads have other than 128 channels";
  if (p.num_heads != 8 && p.num_heads != 16 && p.num_heads != 32 && p.num_heads != 64) {
    return "there are other than 8, 16, 32 or 64 heads";
  }
  if (!Aligned16(p.q)) return kUnreadable;
  // Coordinates are 32-bit: of heads, and of the scales' bytes.
  constexpr int64_t kMost = int64_t{1} << 31;
  if ((p.rows + 256) * p.num_heads >= kMost) return kTooMany;
  // Units of work (cuda/mqa_logits/schedule.cuh) are counted in 32 bits: more of them have 500 GB
  // of logits.
  const int64_t groups = LogitsGroupCount(p, LogitsColumns(p) / p.num_heads);
  const int64_t keys = p.paged ? p.columns : std::max(p.columns, p.num_keys);
  if (groups * (keys / kLogitsTileKeys + 6) >= kMost) return kTooMany;
  if (!p.paged) {
    if (p.num_keys <= 0) return "there are no keys";
    if ((p.num_keys + kLogitsTileKeys) * kLogitsScaleBytes >= kMost) return kTooMany;
    return Aligned16(p.keys) && Aligned16(p.key_scales) ? nullptr : kUnreadable;
  }
  const int64_t size = p.page_size;
  if (p.num_pages <= 0) return "there are no pages";
  if (size % kLogitsTileKeys != 0 && size != 8 && size != 16 && size != 32) {
    return "pages have other than 8, 16, 32 or a multiple of 64 tokens";
  }
  if (!Aligned16(p.cache) || p.page_stride % 16 != 0 || p.page_stride <= 0) return kUnreadable;
  return p.columns < kMost - kLogitsTileKeys ? nullptr : kTooMany;
}

}  // namespace logits_rows

inline constexpr LogitsRow kLogitsKernels[] = {
    {LogitsKernel::kWgmma, "mqa_logits/wgmma", kOnlySm90, logits_rows::WgmmaLacks},
    {LogitsKernel::kMma, "mqa_logits/mma", kFromSm80, LacksNothing<LogitsParams>},
};

}  // namespace fastattn
