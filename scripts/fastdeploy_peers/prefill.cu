// The operators around the flash attention of a step with prefill: gqa_rope_write_cache ahead of
// it, merge_prefill_decode_output behind it.

// FD_ENABLE_RL is off, as in append.cu.
#define DISPATCH_BOOL_DTYPE(flag, FLAG, ...) \
  {                                          \
    constexpr bool FLAG = false;             \
    __VA_ARGS__                              \
  }

#include "append_attn/gqa_rope_write_cache.cu"
#include "call.h"
#include "merge_prefill_decode_output.cu"

extern "C" {

struct PeerPrefill {
  const char* quant;
  int neox, rope_3d, max_model_len, kv_tokens;
};

/// The operator's 26 tensors in its order. Q, K and V lie in the workspace, where `made` tells.
const char* peer_gqa_rope_write_cache(const PeerTensor* tensors, const PeerPrefill* set,
                                      const void** made, const PeerCall* where) {
  return standin::Run(*where, [&] {
    paddle::Tensor in[17];
    paddle::optional<paddle::Tensor> o[9];
    for (int i = 0; i < 17; ++i) in[i] = standin::Given(tensors[i]);
    for (int i = 0; i < 9; ++i) o[i] = standin::GivenOrNone(tensors[17 + i]);
    const auto results = GQARopeWriteCacheKernel(
        in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7], in[8], in[9], in[10], in[11],
        in[12], in[13], in[14], in[15], in[16], o[0], o[1], o[2], o[3], o[4], o[5], o[6], o[7],
        o[8], set->kv_tokens, set->max_model_len, 1e-6f, set->neox != 0, set->quant,
        set->rope_3d != 0);
    for (int i = 0; i < 3; ++i) made[i] = results[i].data<char>();
  });
}

/// The operator's 6 tensors in its order; the first is written.
const char* peer_merge_prefill_decode(const PeerTensor* tensors, int heads, int dim,
                                      const PeerCall* where) {
  return standin::Run(*where, [&] {
    paddle::Tensor in[6];
    for (int i = 0; i < 6; ++i) in[i] = standin::Given(tensors[i]);
    MergePrefillDecodeOutput(in[0], in[1], in[2], in[3], in[4], in[5], heads, dim, 1);
  });
}
}
