// Which kernel takes a call of mla_sparse_attention on a GPU, and how it is shared out: pure
// functions of what the host knows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params/mla_attention.h"
#include "plan/kernel_row.h"
#include "plan/limits.h"

namespace fastattn {

enum class MlaSparseKernel : int { kWgmma, kSimple };

using MlaSparseRow = KernelRow<MlaSparseKernel, MlaSparseParams>;

inline constexpr int kMlaSparseTileKeys = 64;   // of the sm_90 kernels
inline constexpr int kMlaSparseMaxSplits = 64;  // of a token's keys

namespace mla_sparse_rows {

inline Reason SelectionLacks(const MlaSelection& s, int dim) {
  const MlaCache& c = s.cache;
  if (c.format == MlaFormat::kFp8x528) return "a cache has format fp8_528";
  const bool dims = c.format == MlaFormat::kFp8x584   ? dim == 512
                    : c.format == MlaFormat::kFp8x656 ? dim == 576
                                                      : dim == 576 || dim == 512;
  if (!dims) return "the format has heads of other sizes";
  // The kernels have places of 32 bits, in units of 8 bytes.
  if ((c.num_pages - 1) > (int64_t{1} << 34) / std::max<int64_t>(c.page_stride, 1) ||
      c.page_size * c.row_stride > int64_t{1} << 33) {
    return "a cache is too large";
  }
  if (c.format == MlaFormat::kFp8x584 && c.ScalePlane() % 8 != 0) {
    return "a page's scales begin at no multiple of 8 bytes";
  }
  const bool aligned = reinterpret_cast<intptr_t>(c.data) % 16 == 0 && c.page_stride % 16 == 0 &&
                       c.row_stride % 16 == 0;
  return aligned ? nullptr : "rows of a cache begin at no multiples of 16 bytes";
}

inline Reason WgmmaLacks(const MlaSparseParams& p) {
  if (p.heads <= 0) return "the call is empty";
  if (p.out_float != nullptr && p.max_logits != nullptr) {
    return "fp32 outputs come with no largest logits";
  }
  if (p.dim != 576 && p.dim != 512) return "heads have neither 576 nor 512 channels";
  if (const Reason reason = SelectionLacks(p.keys, p.dim); reason != nullptr) return reason;
  if (p.extra.topk != 0) {
    if (const Reason reason = SelectionLacks(p.extra, p.dim); reason != nullptr) return reason;
    if (p.extra.cache.format != p.keys.cache.format) return "the caches have different formats";
  }
  const bool aligned = reinterpret_cast<intptr_t>(p.q) % 16 == 0 &&
                       reinterpret_cast<intptr_t>(p.out) % 16 == 0 && p.q_token_stride % 8 == 0 &&
                       p.q_head_stride % 8 == 0;
  return aligned ? nullptr : "queries or outputs begin at no multiples of 16 bytes";
}

}  // namespace mla_sparse_rows

inline constexpr MlaSparseRow kMlaSparseKernels[] = {
    {MlaSparseKernel::kWgmma, "mla/sparse_attention/wgmma_sm90", kOnlySm90,
     mla_sparse_rows::WgmmaLacks},
    {MlaSparseKernel::kSimple, "mla/sparse_attention/simple", kFromSm80,
     LacksNothing<MlaSparseParams>},
};

// Of a call that the sm_90 kernels take.
struct MlaSparsePlan {
  int heads = 0;        // of a group: 8 and 16 take the narrow kernel, 64 the wide one
  int head_groups = 0;  // of a token
  int splits = 1;       // of a token's keys
  bool pairs = false;   // neighbouring groups of heads are CTAs of a cluster
  // Bytes, at multiples of 256: the LSEs of the splits, and the outputs after them.
  int64_t lse_bytes = 0;
  int64_t workspace = 0;
};

inline int MlaSparseTiles(int topk) { return (topk + kMlaSparseTileKeys - 1) / kMlaSparseTileKeys; }

// Splits of each token's keys: as many as make the call shortest, in tiles that the busiest
// multiprocessor goes through.
inline int MlaSparseSplits(const MlaSparseParams& p, int64_t head_groups, int processors) {
  if (p.max_logits != nullptr) return 1;  // it is not among the partial results
  const int64_t items = p.tokens * head_groups;
  const int tiles = MlaSparseTiles(p.keys.topk) + MlaSparseTiles(p.extra.topk);
  // Only what merges splits writes fp32.
  const int fewest = p.out_float != nullptr ? 2 : 1;
  int best = fewest;
  int64_t least = INT64_MAX;
  for (int splits = fewest; splits <= std::min(tiles, kMlaSparseMaxSplits); ++splits) {
    const int64_t waves = (items * splits + processors - 1) / processors;
    const int64_t cost = waves * ((tiles + splits - 1) / splits + kMlaSparseFixedTiles) +
                         (splits > 1 ? kMlaSparseFixedTiles : 0);
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

inline MlaSparsePlan PlanMlaSparse(const MlaSparseParams& p, int processors) {
  MlaSparsePlan plan;
  plan.heads = p.heads <= 8 ? 8 : p.heads <= 16 ? 16 : 64;
  plan.head_groups = (p.heads + plan.heads - 1) / plan.heads;
  plan.splits = MlaSparseSplits(p, plan.head_groups, processors);
  // Key tiles that all CTAs go through, at most.
  const int64_t tiles =
      p.tokens * plan.head_groups * (MlaSparseTiles(p.keys.topk) + MlaSparseTiles(p.extra.topk));
  plan.pairs = plan.head_groups % 2 == 0 && tiles >= int64_t{kMlaSparsePairTiles} * processors;
  if (plan.splits > 1) {
    const int64_t results = p.tokens * p.heads * plan.splits;
    plan.lse_bytes = (results * 4 + 255) / 256 * 256;
    plan.workspace = plan.lse_bytes + results * kMlaValueDim * 4;
  }
  return plan;
}

struct MlaSparseDecision {
  MlaSparseKernel kernel = MlaSparseKernel::kSimple;
  MlaSparsePlan plan;
};

// `major` is of the compute capability.
inline MlaSparseDecision DecideMlaSparse(const MlaSparseParams& p, int major, int processors) {
  MlaSparseDecision decision;
  decision.kernel = ChooseKernel(kMlaSparseKernels, p, major).kernel;
  if (decision.kernel == MlaSparseKernel::kWgmma) decision.plan = PlanMlaSparse(p, processors);
  return decision;
}

}  // namespace fastattn
