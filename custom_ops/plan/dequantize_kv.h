// Whether the keys and values of a call's long sequences become 16-bit ones in a workspace, once,
// ahead of the attention. A work tile of a prefill kernel is 128 tokens of one head; each converts
// the codes of all its keys, and multiplies by their tokens' scales. With many tiles over the same
// keys, writing and reading 16-bit values takes less time than that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/ceil_div.h"
#include "params/attention.h"
#include "params/dequantized_kv.h"
#include "plan/attention_plan.h"
#include "plan/kernel_row.h"
#include "plan/limits.h"
#include "plan/wgmma_support.h"

namespace fastattn {

// Packed rows that see a key of a sequence, on average, from which 16-bit keys pay; 0: they never
// do.
inline int64_t DequantizeFrom(const AttentionParams& p, bool has_prefill_kernel) {
  if (!has_prefill_kernel) return kDequantizeRowsOfMma;
  if (!p.paged) return 0;
  if (p.head_dim > 128) return kDequantizeRowsOfLargeHeads;
  if (!IsDynamic(p.cache.type)) return 0;
  if (CodesPerByte(p.cache.dtype) == 2) return kDequantizeRowsOf4Bits;
  return p.cache.dtype == DType::kInt8 ? kDequantizeRowsOfInt8 : kDequantizeRowsOfFp8;
}

// What a call may take, and has to have.
struct DequantizeLimits {
  int64_t bytes = kDequantizedBytes;
  double operations = kDequantizedOperations;
};

// Whether a call has operations enough to pay for launches and for CTAs that find no keys, which
// there is room for. Keys of a prefix are known by a bound only, which may be far off. So an eighth
// of it is reckoned with, and without a prefix at most half of the cost may be lost.
inline bool WorthDequantizing(const AttentionParams& p, int64_t blocks, double operations) {
  const double per_key =
      2.0 * p.seqs.num_tokens * p.num_heads * (p.head_dim + ValueDim(p.head_dim));
  const double longest_q = std::min(p.max_seqlen_q, p.seqs.num_tokens);
  const double longest_k = std::max<double>(p.max_seqlen_k, longest_q);
  const double cost = operations * (3 + blocks * p.num_kv_heads / kIdleCtas);
  const double least = per_key * longest_q / 2, most = per_key * (longest_k - longest_q / 2);
  return least >= cost / 2 && least + (most - least) / 8 >= cost;
}

// What the kernel of contiguous codes asks of them: one scale for all sequences.
inline bool DequantizesRagged(const RaggedKv& kv) {
  if (kv.dtype != DType::kE4M3 && kv.dtype != DType::kE5M2 && kv.dtype != DType::kInt8) {
    return false;
  }
  for (const Descale* scale : {&kv.k_descale, &kv.v_descale}) {
    if (scale->data != nullptr && scale->batch_stride != 0) return false;
  }
  for (int64_t stride :
       {kv.key_token_stride, kv.key_head_stride, kv.value_token_stride, kv.value_head_stride}) {
    if (!IsTmaStride(stride, kv.dtype)) return false;
  }
  return IsTmaAligned(kv.key) && IsTmaAligned(kv.value);
}

// Room for the sequences of a paged call that may take part, as long as they may be; the bounds of
// `plan` are set. A sequence's row of the block table has at most an eighth of the memory.
inline void GiveRoom(const AttentionParams& p, int64_t block_bytes, int64_t memory,
                     DequantizePlan* plan) {
  const int64_t seqs = std::min<int64_t>(p.seqs.batch, p.seqs.num_tokens / plan->min_tokens);
  const int64_t longest =
      std::min<int64_t>(p.seqs.max_blocks, CeilDiv<int64_t>(p.max_seqlen_k, kBlockSize));
  const int64_t row = static_cast<int64_t>(sizeof(int)) * p.seqs.batch;
  const int64_t width = std::min(longest, memory / 8 / row);
  // Planes and tokens are numbered in 32 bits.
  const int64_t most = std::numeric_limits<int>::max() / (2 * kBlockSize * p.num_kv_heads);
  const int64_t left = memory - row * (width + 5);
  const int64_t blocks = std::min({seqs * width, left / block_bytes, most});
  if (width < 1 || blocks < 1) return;
  plan->blocks = blocks;
  plan->table_width = std::min(width, blocks);
}

// Why a call's codes are attended as they are, by what is cheapest to look at first; or null. The
// rest of the rule is in PlanDequantize.
inline Reason LacksToDequantize(const AttentionParams& p) {
  // fp16 does not hold the product of any code with any scale.
  if (p.q_dtype != DType::kBFloat16) return "its queries are not bf16";
  if (p.batch_invariant) return "the call is batch-invariant";
  if (p.IsGeneral()) return kGeneralCall;
  if (p.max_seqlen_q < kLongSeq) return "no sequence has as many as 64 new tokens";
  if (p.window_left >= 0) return "a window leaves most keys unseen";
  if (p.paged && !IsQuantized(p.cache.type)) return "the cache has no codes";
  if (p.paged && p.cache.layout != CacheLayout::kFastattn) return "the cache has another layout";
  if (!p.paged && !DequantizesRagged(p.ragged)) {
    return "the keys are no 8-bit codes with one scale for all sequences, or TMA cannot read them";
  }
  return nullptr;
}

inline constexpr Reason kNeverPays = "wgmma kernels attend such codes faster than 16-bit values";
inline constexpr Reason kFewRows = "too few packed rows see a key";
inline constexpr Reason kNoRoom = "there is no room for it";
inline constexpr Reason kTooShort = "the call is too short to pay for its launches";

// `min_tokens`: of sequences that whole tiles take. *reason: why not, where the plan is empty.
inline DequantizePlan PlanDequantize(const AttentionParams& p, bool has_prefill_kernel,
                                     int64_t min_tokens, const DequantizeLimits& limits,
                                     Reason* reason) {
  DequantizePlan plan;
  *reason = LacksToDequantize(p);
  if (*reason == nullptr) *reason = wgmma_support::Common(p);
  if (*reason == nullptr && !Wgmma16BitHeadDims::Has(p.head_dim)) *reason = kOtherHeadDim;
  if (*reason != nullptr) return plan;
  const int64_t rows = DequantizeFrom(p, has_prefill_kernel);
  const int64_t group = p.num_heads / p.num_kv_heads;
  *reason = rows == 0 ? kNeverPays : group * p.max_seqlen_q < rows ? kFewRows : nullptr;
  if (*reason != nullptr) return plan;
  plan.min_rows = rows;
  // That many rows see a key only where a sequence has as many.
  plan.min_tokens = static_cast<int>(std::max(min_tokens, CeilDiv(rows, group)));
  const int64_t block_bytes = kBlockSize * p.num_kv_heads * (p.head_dim + ValueDim(p.head_dim)) *
                              int64_t{SizeOf(p.q_dtype)};
  if (p.paged) {
    GiveRoom(p, block_bytes, limits.bytes, &plan);
  } else {
    // All sequences or none: as many rows must see a key on average.
    plan.min_tokens = static_cast<int>(min_tokens);
    const double row_keys = static_cast<double>(group) * p.seqs.num_tokens * p.max_seqlen_k;
    const int64_t blocks = CeilDiv<int64_t>(p.ragged.num_tokens, kBlockSize);
    if (row_keys < static_cast<double>(rows) * p.ragged.num_tokens) {
      *reason = kFewRows;
    } else if (blocks <= limits.bytes / block_bytes) {
      plan.blocks = blocks;
    }
  }
  if (plan.blocks > 0 && WorthDequantizing(p, plan.blocks, limits.operations)) return plan;
  if (*reason == nullptr) *reason = plan.blocks > 0 ? kTooShort : kNoRoom;
  return DequantizePlan{};
}

}  // namespace fastattn
