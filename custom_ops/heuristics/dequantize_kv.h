// Whether the keys and values of a call's long sequences become 16-bit ones in a workspace, once,
// ahead of the attention. A work tile of a prefill kernel is 128 tokens of one head; each converts
// the codes of all its keys, and multiplies by their tokens' scales. With many tiles over the same
// keys, writing and reading 16-bit values takes less time than that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/ceil_div.h"
#include "heuristics/attention_plan.h"
#include "heuristics/wgmma_support.h"
#include "params/attention.h"
#include "params/dequantized_kv.h"

namespace fastattn {

// Of memory, at most, where nothing else is asked for (api/attention_run.cc).
inline constexpr int64_t kDequantizedBytes = int64_t{512} << 20;

// Packed rows that see a key of a sequence, on average, from which 16-bit keys pay; 0: they
// never do. From the time that a key's codes cost a work tile beside its two copies (H100, tables
// in docs/experiments/wgmma_q16.md).
inline int64_t DequantizeFrom(const AttentionParams& p, bool has_prefill_kernel) {
  if (!has_prefill_kernel) return 128;
  if (!p.paged) return 0;
  if (p.head_dim > 128) return 400;
  if (!IsDynamic(p.cache.type)) return 0;
  if (CodesPerByte(p.cache.dtype) == 2) return 300;
  return p.cache.dtype == DType::kInt8 ? 450 : 500;
}

// Operations (4 for a query, key, head and channel) that 16-bit keys save a third of what the
// launches take: some 8 us. Where nothing else is asked for (api/attention_run.cc).
inline constexpr double kDequantizedOperations = 4e9;
// CTAs without work of append_cache_kv_c8's kernel that take as long.
inline constexpr double kIdleCtas = 7000;

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

// Whether a call may have sequences for that, by what is cheapest to look at.
inline bool MayDequantize(const AttentionParams& p) {
  return p.max_seqlen_q >= kLongSeq && p.q_dtype == DType::kBFloat16 && !p.batch_invariant;
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

// `min_tokens`: of sequences that whole tiles take.
inline DequantizePlan PlanDequantize(const AttentionParams& p, bool has_prefill_kernel,
                                     int64_t min_tokens, const DequantizeLimits& limits) {
  DequantizePlan plan;
  // fp16 does not hold the product of any code with any scale.
  if (!MayDequantize(p)) return plan;
  if (p.window_left >= 0) return plan;  // most keys are not seen
  const bool codes = p.paged ? IsQuantized(p.cache.type) && p.cache.layout == CacheLayout::kFastattn
                             : DequantizesRagged(p.ragged);
  if (!codes) return plan;
  if (!wgmma_support::Common(p) || !Wgmma16BitHeadDims::Has(p.head_dim)) return plan;
  const int64_t rows = DequantizeFrom(p, has_prefill_kernel);
  const int64_t group = p.num_heads / p.num_kv_heads;
  if (rows == 0 || group * p.max_seqlen_q < rows) return plan;
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
    if (row_keys >= static_cast<double>(rows) * p.ragged.num_tokens &&
        blocks <= limits.bytes / block_bytes) {
      plan.blocks = blocks;
    }
  }
  const bool pays = plan.blocks > 0 && WorthDequantizing(p, plan.blocks, limits.operations);
  return pays ? plan : DequantizePlan{};
}

}  // namespace fastattn
