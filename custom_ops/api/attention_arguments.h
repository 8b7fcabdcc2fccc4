// Arguments of flash_attention, paged_attention and attention_step, checked into AttentionParams.
#pragma once

#include <string>

#include "api/check.h"
#include "params/attention.h"
#include "params/key_transform.h"

namespace fastattn::api {

inline constexpr const char* kFlash = "flash_attention";
inline constexpr const char* kPaged = "paged_attention";

// What an attention takes beside its queries, keys and values. A null tensor was not given.
struct AttentionArgs {
  const Tensor* q_descale = nullptr;
  const Tensor* sinks = nullptr;
  const Tensor* mask_offsets = nullptr;
  const Tensor* out_scale = nullptr;
  const Tensor* out = nullptr;
  std::string out_dtype = "auto";
  float softmax_scale = 0;
  double softcap = 0;
  bool causal = false;
  int64_t window_left = -1;
  int64_t window_right = -1;
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  bool return_softmax_lse = false;
  bool quantize_q = false;
  bool flat = false;       // the output is [T, H * D]
  KeyTransform transform;  // of the keys
};

// The queries, first of all: their number of tokens, heads and channels decides what else fits.
void ParseQuery(const char* op, const Tensor& q, AttentionParams* p);

// Heads and channels of the keys, which the tensor `keys` has.
void CheckHeads(const char* op, const char* keys, int64_t kv_heads, int64_t head_dim,
                AttentionParams* p);

// Shape of the output: V's channels may be fewer than K's.
Shape OutputShape(const AttentionArgs& args, const AttentionParams& p);

// Keys, values and lengths of flash_attention.
void ParseRaggedKv(const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                   const Tensor& cu_seqlens_k, const Tensor* k_descale, const Tensor* v_descale,
                   const std::string& kv_dtype, const phi::Place& place, AttentionParams* p);

// The masks of paged_attention that are no interval of keys; p holds its sequences already.
void ParseHoles(const Tensor* tree_mask, const Tensor* head_windows, const phi::Place& place,
                AttentionParams* p);

// A side of a window as the kernels have it: -1 where it is unlimited.
int WindowSide(const char* op, int64_t side);

// Refuses an output that shares memory with the queries, apart from those that it replaces.
void RequireApartFromQueries(const char* op, const Tensor& out, const Tensor& q,
                             const AttentionParams& p);

// What all attentions take; p holds queries, sequences and head counts already.
void ParseCommon(const char* op, const AttentionArgs& args, const phi::Place& place,
                 AttentionParams* p);

}  // namespace fastattn::api
