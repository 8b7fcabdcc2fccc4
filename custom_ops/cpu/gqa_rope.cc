#include "cpu/gqa_rope.h"

#include <algorithm>
#include <vector>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/head_dims.h"
#include "cpu/append_cache.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/rope_head.h"
#include "cpu/token_seqs.h"

namespace fastattn::cpu {

namespace {

template <DType kDType, typename Kv, int kHeadDim>
class Step {
  using T = typename Element<kDType>::Storage;

 public:
  explicit Step(const GqaRopeWriteCacheParams& p)
      : p_(p),
        rope_(p.rope),
        cache_(p.rope.cache),
        q_weight_(Widened(rope_.q_norm_weight, rope_.q_norm_dtype, kHeadDim)),
        k_weight_(Widened(rope_.k_norm_weight, rope_.k_norm_dtype, kHeadDim)) {}

  // `batch_idx` is the token's sequence, or -1 for padding.
  void Token(int64_t token, int batch_idx) const {
    const int heads = rope_.num_heads, kv_heads = rope_.cache.num_kv_heads;
    float x[kHeadDim];
    if (batch_idx < 0) {
      std::fill_n(x, kHeadDim, 0.0f);
      for (int h = 0; h < heads + 2 * kv_heads; ++h) Store(token, h, x);
      return;
    }
    const int64_t position = PositionOf(rope_.seqs, batch_idx, token);
    Angles angles;
    if (rope_.style != RotaryStyle::kNone) LoadAngles(rope_, batch_idx, position, angles);
    const bool prefill = p_.seq_lens_encoder[batch_idx] > 0;
    const int block = prefill ? BlockOf(rope_.seqs.block_tables, rope_.seqs.max_blocks,
                                        rope_.cache.num_blocks, batch_idx, position / kBlockSize)
                              : -1;
    const int slot = static_cast<int>(position % kBlockSize);
    const int64_t out = OutToken(token, batch_idx);
    for (int h = 0; h < heads + 2 * kv_heads; ++h) {
      Load(token, h, x);
      const bool is_value = h >= heads + kv_heads;
      if (!is_value) {
        TransformHead<kDType, kHeadDim>(rope_, angles, h < heads ? q_weight_ : k_weight_, x);
      }
      Store(token, h, x);
      if (h < heads) continue;
      const int kv = (h - heads) % kv_heads;
      if (out >= 0) {
        T* target = static_cast<T*>(is_value ? p_.value : p_.key);
        StoreRow<kDType>(x, kHeadDim, target + (out * kv_heads + kv) * kHeadDim);
      }
      if (block >= 0) is_value ? cache_.Value(block, kv, slot, x) : cache_.Key(block, kv, slot, x);
    }
  }

 private:
  // Token of key and value that a new token becomes, or -1.
  int64_t OutToken(int64_t token, int batch_idx) const {
    const SeqMeta& seqs = rope_.seqs;
    const int64_t first = p_.cu_seqlens_k[batch_idx];
    const int64_t prefix =
        PrefixLength(p_.seq_lens_encoder[batch_idx], seqs.seq_lens_decoder[batch_idx]);
    const int64_t out = first + prefix + (token - seqs.cu_seqlens_q[batch_idx]);
    return first >= 0 && out < p_.num_kv_tokens ? out : -1;
  }

  void Load(int64_t token, int head, float* x) const {
    const T* qkv = static_cast<const T*>(rope_.qkv) + token * rope_.qkv_stride;
    LoadRow<kDType>(qkv + static_cast<int64_t>(head) * kHeadDim, kHeadDim, x);
  }

  void Store(int64_t token, int head, const float* x) const {
    const int64_t heads = rope_.num_heads, kv_heads = rope_.cache.num_kv_heads;
    T* fused = static_cast<T*>(p_.qkv_out) + (token * (heads + 2 * kv_heads) + head) * kHeadDim;
    StoreRow<kDType>(x, kHeadDim, fused);
    if (head < heads) {
      StoreRow<kDType>(x, kHeadDim, static_cast<T*>(rope_.q) + (token * heads + head) * kHeadDim);
    }
  }

  const GqaRopeWriteCacheParams& p_;
  const RopeWriteCacheParams& rope_;
  CacheWriter<Kv, CacheLayout::kFastDeploy> cache_;
  std::vector<float> q_weight_;
  std::vector<float> k_weight_;
};

}  // namespace

void GqaRopeWriteCache(const GqaRopeWriteCacheParams& p) {
  const std::vector<int> seq_of_token = SeqOfTokens(p.rope.seqs);
  DispatchCache(p.rope.cache, [&](auto format) {
    dispatch<DType::kBFloat16, DType::kFloat16>(p.rope.dtype, "dtype", [&](auto dtype) {
      HeadDims::Dispatch(p.rope.cache.head_dim, [&](auto head_dim) {
        const Step<decltype(dtype)::value, decltype(format), decltype(head_dim)::value> step(p);
        const int64_t heads = p.rope.num_heads + 2LL * p.rope.cache.num_kv_heads;
        const int64_t work = 2 * heads * p.rope.cache.head_dim;  // rotated and written
        ParallelFor(p.rope.seqs.num_tokens, work, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) step.Token(t, seq_of_token[t]);
        });
      });
    });
  });
  AppendCache(PrefixOf(p));
}

}  // namespace fastattn::cpu
