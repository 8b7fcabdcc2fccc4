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

// Packed GQA rows that see a key of a sequence, on average, from which 16-bit keys pay; 0: they
// never do. From the time that a key's codes cost a work tile beside its two copies (H100, tables
// in docs/experiments/wgmma_fp16.md).
inline int64_t DequantizeFrom(const AttentionParams& p, bool has_prefill_kernel) {
  if (!has_prefill_kernel) return 128;
  if (!p.paged) return 0;
  if (p.head_dim > 128) return 400;
  if (!IsDynamic(p.cache.type)) return 0;
  if (CodesPerByte(p.cache.dtype) == 2) return 300;
  return p.cache.dtype == DType::kInt8 ? 450 : 500;
}

// Operations of a call (4 for a query, key, head and channel) that take about as long as the
// launches, some 8 us, with the fewest keys that its queries can have; where nothing else is asked
// for (api/attention_run.cc).
inline constexpr double kDequantizedOperations = 4e9;

// What a call may take, and has to have.
struct DequantizeLimits {
  int64_t bytes = kDequantizedBytes;
  double operations = kDequantizedOperations;
};

// Whether there is enough to gain. Keys of a prefix are known by a bound only, which may be far
// off: then a chunk without one is a little slower, and with one a quarter faster. With as many
// keys as that bound lets it have, a call must have operations for the conversion, too.
inline bool WorthDequantizing(const AttentionParams& p, double operations) {
  const double columns =
      2.0 * p.seqs.num_tokens * p.num_heads * (p.head_dim + ValueDim(p.head_dim));
  const double longest_q = p.max_seqlen_q, longest_k = std::max(p.max_seqlen_k, p.max_seqlen_q);
  return columns * longest_q / 2 >= operations &&
         columns * (longest_k - longest_q / 2) >= 5 * operations;
}

// Whether a call may have sequences for that, by what is cheapest to look at.
inline bool MayDequantize(const AttentionParams& p) {
  return p.max_seqlen_q >= kLongSeq && p.q_dtype == DType::kBFloat16 && !p.batch_invariant;
}

// What the kernel of contiguous codes asks of them.
inline bool DequantizesRagged(const RaggedKv& kv) {
  if (kv.dtype != DType::kE4M3 && kv.dtype != DType::kE5M2 && kv.dtype != DType::kInt8) {
    return false;
  }
  for (int64_t stride :
       {kv.key_token_stride, kv.key_head_stride, kv.value_token_stride, kv.value_head_stride}) {
    if (!IsTmaStride(stride, kv.dtype)) return false;
  }
  return IsTmaAligned(kv.key) && IsTmaAligned(kv.value);
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
  if (rows == 0 || group * p.max_seqlen_q < rows || !WorthDequantizing(p, limits.operations)) {
    return plan;
  }
  plan.min_rows = rows;
  plan.min_tokens = static_cast<int>(min_tokens);
  const int64_t block_bytes = kBlockSize * p.num_kv_heads * (p.head_dim + ValueDim(p.head_dim)) *
                              int64_t{SizeOf(p.q_dtype)};
  if (!p.paged) {
    const int64_t blocks = CeilDiv<int64_t>(p.ragged.num_tokens, kBlockSize);
    if (blocks <= limits.bytes / block_bytes) plan.blocks = blocks;
    return plan;
  }
  // That many rows see a key only where a sequence has as many.
  plan.min_tokens = static_cast<int>(std::max(min_tokens, CeilDiv(rows, group)));
  const int64_t seqs = std::min<int64_t>(p.seqs.batch, p.seqs.num_tokens / plan.min_tokens);
  const int64_t longest =
      std::min<int64_t>(p.seqs.max_blocks, CeilDiv<int64_t>(p.max_seqlen_k, kBlockSize));
  // Planes and tokens are numbered in 32 bits.
  const int64_t most = std::numeric_limits<int>::max() / (2 * kBlockSize * p.num_kv_heads);
  const int64_t blocks = std::min({seqs * longest, limits.bytes / block_bytes, most});
  if (blocks < 1) return plan;
  plan.blocks = blocks;
  plan.table_width = std::min(longest, blocks);
  return plan;
}

}  // namespace fastattn
