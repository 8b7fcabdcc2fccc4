// Arguments of flash_attention and paged_attention, checked into AttentionParams.
#pragma once

#include <string>
#include <vector>

#include "api/check.h"
#include "params/attention.h"
#include "params/key_transform.h"

namespace fastattn::api {

inline constexpr const char* kFlash = "flash_attention";
inline constexpr const char* kPaged = "paged_attention";

// What both operators take beside their keys and values.
struct AttentionArgs {
  const Tensor& q;
  const Tensor* q_descale;
  const Tensor* sinks;
  const Tensor* mask_offsets;
  const Tensor* out_scale;
  const Tensor* out;
  const std::string& out_dtype;
  float softmax_scale;
  double softcap;
  bool causal;
  int64_t window_left;
  int64_t window_right;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  bool return_softmax_lse;
  bool quantize_q;
  KeyTransform transform;  // of the keys
};

// The queries, first of all: their number of tokens, heads and channels decides what else fits.
void ParseQuery(const char* op, const Tensor& q, AttentionParams* p);

// Heads and channels of the keys, which the tensor `keys` has.
void CheckHeads(const char* op, const char* keys, int64_t kv_heads, int64_t head_dim,
                AttentionParams* p);

// Shape of the output for q: V's channels may be fewer than K's.
std::vector<int64_t> OutputShape(const Tensor& q, const AttentionParams& p);

// Keys, values and lengths of flash_attention.
void ParseRaggedKv(const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                   const Tensor& cu_seqlens_k, const Tensor* k_descale, const Tensor* v_descale,
                   const std::string& kv_dtype, const phi::Place& place, AttentionParams* p);

// The masks of paged_attention that are no interval of keys; p holds its sequences already.
void ParseHoles(const Tensor* tree_mask, const Tensor* head_windows, const phi::Place& place,
                AttentionParams* p);

// A side of a window as the kernels have it: -1 where it is unlimited.
int WindowSide(const char* op, int64_t side);

// What both operators take; p holds queries, sequences and head counts already.
void ParseCommon(const char* op, const AttentionArgs& args, const phi::Place& place,
                 AttentionParams* p);

}  // namespace fastattn::api
