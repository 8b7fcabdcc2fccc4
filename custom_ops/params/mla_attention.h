// Attention over caches of multi-head latent attention (MLA): all heads share a token's key, and
// its value is the key's first 512 channels.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/common.h"
#include "params/mla_cache.h"

namespace fastattn {

// Channels of a value, and of an output.
inline constexpr int kMlaValueDim = 512;

// Keys that each query names: entries [0, length) of its row of `indices`, token slots of the
// cache. A slot outside the cache is skipped and never read; one that stands twice counts twice.
struct MlaSelection {
  MlaCache cache;
  const float* scale = nullptr;  // [1], kFp8
  const int* indices = nullptr;  // [tokens, topk]
  const int* lengths = nullptr;  // [tokens]; null: topk. Clamped to [0, topk]
  int64_t index_stride = 0;      // elements
  int topk = 0;                  // 0: there is no such selection
};

// mla_sparse_attention: one softmax over the keys of both selections.
//
// A query without a key gets 0 and an LSE of -inf. The LSE is natural and without the sink.
struct MlaSparseParams {
  const uint16_t* q = nullptr;  // [tokens, heads, dim] bf16
  int64_t q_token_stride = 0;   // elements
  int64_t q_head_stride = 0;    // elements
  MlaSelection keys;
  MlaSelection extra;            // of the same dim; its format and its pages may differ
  const float* sinks = nullptr;  // [heads] or null
  uint16_t* out = nullptr;       // [tokens, heads, 512] bf16, contiguous
  float* out_float = nullptr;    // not null: the output, unrounded, in place of `out`
  float* lse = nullptr;          // [heads, tokens] or null; flash_mla: [tokens, heads]
  float* max_logits = nullptr;   // the same: the largest scaled score, -inf without a key
  int64_t tokens = 0;
  int heads = 0;
  int dim = 0;  // 576 or 512: channels of a query and of a key
  float softmax_scale = 0.0f;
  // FlashMLA's conventions: statistics have its order of dimensions, and the LSE of a query without
  // a key is +inf.
  bool flash_mla = false;

  FASTATTN_HD float LonelyLse() const {
    return flash_mla ? __builtin_huge_valf() : -__builtin_huge_valf();
  }

  // Where the LSE and the largest logit of a head of a token are.
  FASTATTN_HD int64_t StatisticAt(int64_t token, int head) const {
    return flash_mla ? token * heads + head : head * tokens + token;
  }
};

// mla_attention: each query sees the keys of its sequence, causal ones up to its own position,
// whose page is assigned. Entry i of a block table is the page of keys i * page_size on.
//
// A query without a key gets 0 and an LSE of -inf. The LSE is natural and without the sink.
struct MlaAttentionParams {
  const uint16_t* q = nullptr;  // [num_tokens, heads, dim] bf16
  int64_t q_token_stride = 0;   // elements
  int64_t q_head_stride = 0;    // elements
  MlaCache cache;
  const float* scale = nullptr;  // [1], kFp8
  SeqMeta seqs;
  const float* sinks = nullptr;  // [heads] or null
  uint16_t* out = nullptr;       // [num_tokens, heads, 512] bf16, contiguous; see clear_padding
  float* out_float = nullptr;    // not null: the output, unrounded, in place of `out`
  float* lse = nullptr;          // [heads, num_tokens] or null
  int heads = 0;
  int dim = 0;  // 576, or 512 for kFp8x584 and kFp8x528: channels of a query and of a key
  float softmax_scale = 0.0f;
  bool causal = false;
  // Upper bounds known to the host: that of queries sizes a grid, that of keys is not used yet.
  int max_seqlen_q = 0;
  int max_seqlen_k = 0;
  bool clear_padding = false;  // tokens of no sequence get output 0
  float* workspace = nullptr;  // GPU: plan/mla_attention.h has its size
};

}  // namespace fastattn
