// Attention kernels of one group size, head dimension and cache type: PEER_GROUP, PEER_DIM and
// PEER_BYTES (2: bf16, 1: 8 bits) with PEER_FP8 and PEER_DYNAMIC, for bf16 queries and outputs.

#if PEER_BYTES == 2
#include "append_attn/multiquery_attention_c16_impl.cuh"
#else
#include "append_attn/multiquery_attention_c8_impl.cuh"
#endif

namespace {

using paddle::bfloat16;

// Taking a function's address instantiates it: a block of 16 rows for decode, of 64 for prefill.
template <int ROWS, int WARPS>
constexpr auto Instance() {
#if PEER_BYTES == 2
  return &MultiQueryAppendAttention<bfloat16, PEER_GROUP, PEER_DIM, 64, true, ROWS, WARPS, bfloat16,
                                    true>;
#else
  return &MultiQueryAppendC8Attention<bfloat16, PEER_GROUP, PEER_DIM, 64, true, ROWS, WARPS,
                                      bfloat16, true, PEER_FP8, PEER_DYNAMIC>;
#endif
}

[[gnu::used]] auto decode = Instance<16, 1>();
[[gnu::used]] auto prefill = Instance<64, 4>();

}  // namespace
