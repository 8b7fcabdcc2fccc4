// The CPU kernel of merge_attn_states with strides that no Paddle tensor reaches it with: Paddle
// hands contiguous copies to a custom operator. Compiled by tests/merge/test_merge.py; no Paddle.
#include "cpu/merge.h"

extern "C" void merge_strided(const float* prefix, const float* prefix_lse, const float* suffix,
                              const float* suffix_lse, float* output, float* output_lse,
                              const int64_t* sizes, const int64_t* strides) {
  fastattn::MergeParams p;
  p.dtype = fastattn::DType::kFloat32;
  p.prefix_output = prefix;
  p.prefix_lse = prefix_lse;
  p.suffix_output = suffix;
  p.suffix_lse = suffix_lse;
  p.output = output;
  p.output_lse = output_lse;
  p.num_tokens = p.merged_tokens = sizes[0];
  p.num_heads = static_cast<int>(sizes[1]);
  p.head_dim = static_cast<int>(sizes[2]);
  p.prefix_token_stride = strides[0];
  p.prefix_head_stride = strides[1];
  p.prefix_lse_head_stride = strides[2];
  p.prefix_lse_token_stride = strides[3];
  p.suffix_token_stride = strides[4];
  p.suffix_head_stride = strides[5];
  p.suffix_lse_head_stride = strides[6];
  p.suffix_lse_token_stride = strides[7];
  p.output_token_stride = strides[8];
  p.output_head_stride = strides[9];
  p.output_lse_head_stride = strides[10];
  p.output_lse_token_stride = strides[11];
  fastattn::cpu::MergeAttnStates(p);
}
