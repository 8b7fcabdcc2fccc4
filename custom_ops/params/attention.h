// paged_attention and flash_attention: one Params struct for both, on the CPU and on the GPU.
#pragma once

#include <cstdint>

#include "common/holes.h"
#include "params/common.h"

namespace fastattn {

// Dequantisation multipliers in fp32 or bf16. Dimensions over which they are constant have stride
// 0. Null data means 1.
struct Descale {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t token_stride = 0;  // elements; a query token of the step (Q only)
  int64_t batch_stride = 0;  // elements; a sequence
  int64_t head_stride = 0;   // elements; a KV head, or a query head if per_query_head
  bool per_query_head = false;

  // `head` is a query head, `kv_head` the KV head that it reads.
  FASTATTN_HD int64_t Index(int64_t token, int64_t batch_idx, int64_t kv_head, int64_t head) const {
    return token * token_stride + batch_idx * batch_stride +
           (per_query_head ? head : kv_head) * head_stride;
  }
};

// Ragged K and V: the tokens of all sequences, one sequence after the other (flash_attention).
struct RaggedKv {
  const void* key = nullptr;          // [num_tokens, KV, D]
  const void* value = nullptr;        // [num_tokens, KV, D]
  const int* cu_seqlens_k = nullptr;  // [batch + 1]
  int64_t num_tokens = 0;
  int64_t key_token_stride = 0;  // elements; the channels of a head lie side by side
  int64_t key_head_stride = 0;
  int64_t value_token_stride = 0;
  int64_t value_head_stride = 0;
  DType dtype = DType::kBFloat16;  // of key and value
  Descale k_descale;               // [1], [KV] or [B, KV]
  Descale v_descale;
};

// Query i of a sequence with q queries and k keys has key position i + k - q. Each mask is an
// interval of key positions (see common/visible_keys.h); a key is visible if all of them hold it
// and its block is assigned.
struct AttentionParams {
  const void* q = nullptr;              // [num_tokens, H, D]
  void* out = nullptr;                  // [num_tokens, H, D] contiguous; see clear_padding
  float* lse = nullptr;                 // [H, num_tokens] natural log, or null
  const void* sinks = nullptr;          // [H] logits of the denominator, or null
  const int* mask_offsets = nullptr;    // [num_tokens, 2] (start, end) of visible keys, or null
  const float* out_scale = nullptr;     // [1]: out is e4m3(o / out_scale); null otherwise
  Descale q_descale;                    // [1], [B, KV] or [num_tokens, H], for e4m3 queries
  DType q_dtype = DType::kBFloat16;     // fp32, fp16, bf16, e4m3
  DType out_dtype = DType::kBFloat16;   // fp32, fp16, bf16, e4m3
  DType sinks_dtype = DType::kFloat32;  // fp32 or bf16
  int64_t q_token_stride = 0;           // elements; the channels of a head lie side by side
  int64_t q_head_stride = 0;

  bool paged = false;
  SeqMeta seqs;      // flash_attention: only cu_seqlens_q, batch and num_tokens
  PagedCache cache;  // paged
  RaggedKv ragged;   // else

  int num_heads = 0;
  int num_kv_heads = 0;  // divides num_heads
  int head_dim = 0;
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // cap * tanh(s / cap); 0 = none
  bool causal = false;
  int window_left = -1;  // keys before the diagonal that stay visible; -1 = all
  int window_right = -1;
  int max_seqlen_q = 0;  // upper bounds known to the host: they size a grid, they mask nothing
  int max_seqlen_k = 0;

  // For launchers, which never allocate: floats of plan/attention_plan.h. The CPU kernel
  // plans its splits from the lengths and keeps the partial results itself.
  float* workspace = nullptr;
  // Launchers: counters that are 0 when the kernels begin, with which partial results need no
  // kernel of their own; or null.
  int* arrivals = nullptr;
  int num_arrivals = 0;
  bool clear_padding = false;  // launchers: tokens of no sequence get output 0
  // A sequence's bits follow from the sequence alone (plan/invariant_plan.h). The CPU kernel
  // is like that in any case.
  bool batch_invariant = false;

  // paged, and absent in most calls: kernels of their own serve calls with any of them.
  TreeMask tree;
  const int* head_windows = nullptr;  // [KV, 2] (left, first), or null

  bool IsGeneral() const {
    return tree.data != nullptr || head_windows != nullptr || seqs.head_tables;
  }
  FASTATTN_HD HeadWindow WindowOf(int kv_head) const {
    HeadWindow window;
    if (head_windows != nullptr) {
      window = {head_windows[2 * kv_head], head_windows[2 * kv_head + 1]};
    }
    return window;
  }
};

}  // namespace fastattn
