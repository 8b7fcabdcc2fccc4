// Everything that the host decides about an attention call on a GPU: which kernels run, with which
// tiles and splits, and what workspace they need. A pure function of the call's host values and of
// the device, so that a test reads it without a GPU.
#pragma once

#include <cstdint>

#include "common/ceil_div.h"
#include "params/attention.h"
#include "plan/attention_plan.h"
#include "plan/dequantize_kv.h"
#include "plan/invariant_plan.h"
#include "plan/kernel_row.h"
#include "plan/limits.h"
#include "plan/wgmma_support.h"

namespace fastattn {

struct AttentionDevice {
  int major = 0;  // of the compute capability
  int num_sms = 0;
  int num_clusters = 0;  // of 8 CTAs that run at the same time; 0: unknown
  DequantizeLimits dequantize;
};

// Kernels of a plan's split launches.
struct SplitKernelRow : KernelRow<AttentionKernel, AttentionParams> {
  const SplitTile* (*tile)(const AttentionParams&);
};

inline const SplitTile* MmaSm80TileOf(const AttentionParams& p) {
  return p.IsGeneral() ? &kMmaSm80GeneralTile : &kMmaSm80Tile;
}

inline constexpr SplitKernelRow kSplitKernels[] = {
    {{AttentionKernel::kMmaSm80, "mma_sm80", kFromSm80, LacksNothing<AttentionParams>},
     MmaSm80TileOf},
};

// Kernels of a plan's whole tiles, those of sequences with many new tokens.
struct WholeKernelRow : KernelRow<AttentionKernel, AttentionParams> {
  // New tokens from which a sequence is better off with its whole tiles.
  int64_t (*long_seq)(const AttentionParams&);
  int64_t (*workspace)(const AttentionParams&);  // floats
};

// A wgmma kernel's tiles are 128 tokens of one head, which shorter sequences do not fill; split
// ones are 64 packed rows.
inline int64_t LongWgmmaSeq(const AttentionParams&) { return kLongWgmmaSeq; }
inline int64_t LongQ16Seq(const AttentionParams& p) {
  return SizeOf(KeyType(p)) == 1 ? kLongSeq : kLongWgmmaSeq;  // codes are converted for every head
}
inline int64_t LongMmaSeq(const AttentionParams&) { return kLongSeq; }
inline int64_t NoWorkspace(const AttentionParams&) { return 0; }

inline constexpr WholeKernelRow kWholeKernels[] = {
    {{AttentionKernel::kWgmmaFp8, "wgmma_fp8", kOnlySm90, WgmmaFp8Lacks},
     LongWgmmaSeq,
     WgmmaFp8Workspace},
    {{AttentionKernel::kWgmmaQ16, "wgmma_q16", kOnlySm90, WgmmaQ16Lacks}, LongQ16Seq, NoWorkspace},
    // It takes them in a launch of the plan as any other.
    {{AttentionKernel::kMmaSm80, "mma_sm80", kFromSm80, LacksNothing<AttentionParams>},
     LongMmaSeq,
     NoWorkspace},
};

// GPUs whose kernel of whole tiles over 16-bit values makes dequantised keys worth while.
inline constexpr Architectures kDequantizes = kOnlySm90;

struct AttentionDecision {
  AttentionKernel whole = AttentionKernel::kMmaSm80;  // of whole tiles, where the plan has any
  AttentionPlan plan;
  int64_t prefill_workspace = 0;   // floats of the kernel of whole tiles; they come first
  int64_t workspace = 0;           // floats, those of the plan included
  DequantizePlan dequantize;       // of sequences that whole tiles take; has memory of its own
  Reason no_dequantize = nullptr;  // why it is empty

  // Whether another kernel than the plan's launches takes the whole tiles.
  bool Prefills() const { return whole != AttentionKernel::kMmaSm80; }
};

inline AttentionSizes SizesOfCall(const AttentionParams& p, const AttentionDevice& device) {
  AttentionSizes sizes;
  sizes.num_tokens = p.seqs.num_tokens;
  sizes.batch = p.seqs.batch;
  sizes.num_heads = p.num_heads;
  sizes.num_kv_heads = p.num_kv_heads;
  sizes.head_dim = p.head_dim;
  sizes.element_bytes = SizeOf(KeyType(p));
  sizes.max_seqlen_q = p.max_seqlen_q;
  sizes.max_seqlen_k = p.max_seqlen_k;
  sizes.num_sms = device.num_sms;
  sizes.max_cluster = device.major >= 9 ? 8 : 1;  // 8 is what every such device can do
  sizes.num_clusters = device.num_clusters;
  sizes.per_token_scales = p.paged && IsDynamic(p.cache.type);
  sizes.tile = ChooseKernel(kSplitKernels, p, device.major).tile(p);
  return sizes;
}

// Whether CTAs of eight warps take a split launch over keys of 4 bits, which are here before one
// warp a scheduler has computed on them: clusters certainly take it, and their CTAs have a
// multiprocessor each and more than a KV tile for each of four warps.
inline bool WantsWide(const AttentionParams& p, const AttentionLaunch& launch) {
  if (!p.paged || KeyCodesPerByte(p.cache.type) != 2 || p.head_dim != 128) return false;
  return launch.tile_rows == 8 && launch.cluster > 2 && launch.cluster_kv_tiles == kAnyKvTiles &&
         p.max_seqlen_k > 4 * kBlockSize * launch.cluster;
}

inline constexpr Reason kNothingSplit = "every sequence has whole tiles";
inline constexpr Reason kNothingWhole = "no sequence is long enough for whole tiles";

inline AttentionDecision DecideAttention(const AttentionParams& p, const AttentionDevice& device) {
  AttentionDecision decision;
  const WholeKernelRow& fitting = ChooseKernel(kWholeKernels, p, device.major);
  const SplitKernelRow& split = ChooseKernel(kSplitKernels, p, device.major);
  AttentionSizes sizes = SizesOfCall(p, device);
  sizes.long_seq = fitting.long_seq(p);
  const bool invariant = p.batch_invariant || p.split_invariant;
  decision.plan =
      invariant ? PlanInvariantAttention(sizes, p.split_invariant) : PlanAttention(sizes);
  for (int i = 0; i < decision.plan.num_launches; ++i) {
    AttentionLaunch& launch = decision.plan.launches[i];
    if (launch.split) launch.kernel = split.kernel;
    launch.wide = !invariant && WantsWide(p, launch);
  }
  const AttentionLaunch* whole = decision.plan.Whole();
  decision.no_dequantize = kNothingWhole;
  if (whole != nullptr) {
    decision.whole = fitting.kernel;
    decision.prefill_workspace = fitting.workspace(p);
    decision.no_dequantize = kDequantizes.elsewhere;
  }
  if (whole != nullptr && kDequantizes.Have(device.major)) {
    const int64_t min_tokens =
        CeilDiv<int64_t>(whole->min_packed_rows, p.num_heads / p.num_kv_heads);
    decision.dequantize = PlanDequantize(p, decision.Prefills(), min_tokens, device.dequantize,
                                         &decision.no_dequantize);
  }
  decision.workspace = decision.prefill_workspace + decision.plan.workspace;
  return decision;
}

// Why a kernel takes none of a call's whole tiles; null: it takes them.
inline Reason WhyNotWhole(const WholeKernelRow& row, const AttentionParams& p,
                          const AttentionDevice& device, const AttentionDecision& decision) {
  const Reason reason = row.WhyNot(p, device.major);
  if (reason != nullptr) return reason;
  if (decision.plan.Whole() == nullptr) return kNothingWhole;
  return row.kernel == decision.whole ? nullptr : kTakenBefore;
}

}  // namespace fastattn
