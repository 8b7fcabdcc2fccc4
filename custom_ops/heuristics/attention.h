// Everything that the host decides about an attention call on a GPU: which kernels run, with which
// tiles and splits, and what workspace they need. A pure function of the call's host values and of
// the device, so that a test reads it without a GPU.
#pragma once

#include <cstdint>

#include "common/ceil_div.h"
#include "heuristics/attention_plan.h"
#include "heuristics/dequantize_kv.h"
#include "heuristics/invariant_plan.h"
#include "heuristics/wgmma_support.h"
#include "params/attention.h"

namespace fastattn {

struct AttentionDevice {
  int major = 0;  // of the compute capability
  int num_sms = 0;
  int num_clusters = 0;  // of 8 CTAs that run at the same time; 0: unknown
  DequantizeLimits dequantize;
};

// What takes the plan's whole tiles, those of sequences with many new tokens.
enum class PrefillKernel : int {
  kNone,      // mma_sm80, as the other tiles
  kWgmmaFp8,  // wgmma_sm90/fp8
  kWgmmaQ16,  // wgmma_sm90/q16
};

struct AttentionDecision {
  PrefillKernel prefill = PrefillKernel::kNone;
  AttentionPlan plan;
  int64_t prefill_workspace = 0;  // floats; they come first
  int64_t workspace = 0;          // floats, those of the plan included
  DequantizePlan dequantize;      // of sequences that whole tiles take; has memory of its own
};

inline PrefillKernel ChoosePrefill(const AttentionParams& p, const AttentionDevice& device) {
  if (device.major != 9 || p.IsGeneral()) return PrefillKernel::kNone;
  if (WgmmaFp8Supports(p)) return PrefillKernel::kWgmmaFp8;
  return WgmmaQ16Supports(p) ? PrefillKernel::kWgmmaQ16 : PrefillKernel::kNone;
}

// New tokens from which a sequence is better off with whole tiles. Those of a prefill kernel are
// 128 tokens of one head, which shorter sequences do not fill; split ones are 64 tokens and heads
// together. Measured on an H100: with 32 tokens both take as long for e4m3 queries, and nearly as
// long for 16-bit ones over 16-bit keys. Codes, which wgmma_sm90/q16 converts for every head, are
// slower there up to 63.
inline int64_t LongSeqFor(const AttentionParams& p, PrefillKernel prefill) {
  constexpr int64_t kPrefillSeq = 33;
  const bool converts = prefill == PrefillKernel::kWgmmaQ16 && SizeOf(KeyType(p)) == 1;
  return prefill == PrefillKernel::kNone || converts ? kLongSeq : kPrefillSeq;
}

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
  if (p.IsGeneral()) sizes.least_tile_rows = 16;
  return sizes;
}

inline AttentionDecision DecideAttention(const AttentionParams& p, const AttentionDevice& device) {
  AttentionDecision decision;
  const PrefillKernel fitting = ChoosePrefill(p, device);
  AttentionSizes sizes = SizesOfCall(p, device);
  sizes.long_seq = LongSeqFor(p, fitting);
  decision.plan = p.batch_invariant ? PlanInvariantAttention(sizes) : PlanAttention(sizes);
  if (decision.plan.Whole() != nullptr) decision.prefill = fitting;
  if (decision.prefill == PrefillKernel::kWgmmaFp8) {
    decision.prefill_workspace = WgmmaFp8Workspace(p);
  }
  if (const AttentionLaunch* whole = decision.plan.Whole();
      whole != nullptr && device.major == 9 && !p.IsGeneral()) {
    const int64_t min_tokens =
        CeilDiv<int64_t>(whole->min_packed_rows, p.num_heads / p.num_kv_heads);
    decision.dequantize =
        PlanDequantize(p, decision.prefill != PrefillKernel::kNone, min_tokens, device.dequantize);
  }
  decision.workspace = decision.prefill_workspace + decision.plan.workspace;
  return decision;
}

}  // namespace fastattn
