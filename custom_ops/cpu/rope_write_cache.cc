#include "cpu/rope_write_cache.h"

#include <algorithm>
#include <vector>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/head_dims.h"
#include "common/numeric.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/rope_head.h"
#include "cpu/token_seqs.h"

namespace fastattn::cpu {

namespace {

template <DType kDType, typename Kv, int kHeadDim>
class Writer {
  using E = Element<kDType>;
  using T = typename E::Storage;

 public:
  Writer(const RopeWriteCacheParams& p, const KeyTransform& transform)
      : p_(p),
        transform_(transform),
        cache_(p.cache),
        bias_(Widened(p.bias, p.bias_dtype, (p.num_heads + 2LL * p.cache.num_kv_heads) * kHeadDim)),
        q_weight_(Widened(p.q_norm_weight, p.q_norm_dtype, kHeadDim)),
        k_weight_(Widened(p.k_norm_weight, p.k_norm_dtype, kHeadDim)),
        q_inverse_(p.q_quant == QQuant::kPerTensor ? 1.0f / p.q_scale[0] : 0.0f) {}

  // `batch_idx` is the token's sequence, or -1 for a token that is skipped.
  void Token(int64_t token, int batch_idx) const {
    float x[kHeadDim];
    if (batch_idx < 0) {
      std::fill_n(x, kHeadDim, 0.0f);
      for (int head = 0; head < p_.num_heads; ++head) StoreQ(token, head, x);
      return;
    }
    const int64_t position = PositionOf(p_.seqs, batch_idx, token);
    Angles angles;
    if (p_.style != RotaryStyle::kNone) LoadAngles(p_, batch_idx, position, angles);
    for (int head = 0; head < p_.num_heads; ++head) {
      Load(token, head, x);
      TransformHead<kDType, kHeadDim>(p_, angles, q_weight_, x);
      if (transform_.rotates_q) {
        HadamardRotate(x, kHeadDim);
        RoundRow<kDType>(x, kHeadDim);
      }
      StoreQ(token, head, x);
    }
    const int slot = static_cast<int>(position % kBlockSize);
    for (int head = 0; head < p_.cache.num_kv_heads; ++head) {
      const int64_t table = p_.seqs.TableOf(batch_idx, head, p_.cache.num_kv_heads);
      const int block = BlockOf(p_.seqs.block_tables, p_.seqs.max_blocks, p_.cache.num_blocks,
                                table, position / kBlockSize);
      if (block < 0) continue;
      Load(token, p_.num_heads + head, x);
      TransformHead<kDType, kHeadDim>(p_, angles, k_weight_, x);
      TransformKey(transform_, head, kHeadDim, x);
      cache_.Key(block, head, slot, x, transform_.FeedbackOf(head, kHeadDim));
      Load(token, p_.num_heads + p_.cache.num_kv_heads + head, x);
      RoundRow<kDType>(x, kHeadDim);
      cache_.Value(block, head, slot, x);
    }
  }

 private:
  void Load(int64_t token, int head, float* x) const {
    const int64_t first = static_cast<int64_t>(head) * kHeadDim;
    LoadRow<kDType>(static_cast<const T*>(p_.qkv) + token * p_.qkv_stride + first, kHeadDim, x);
    if (bias_.empty()) return;
    const float* bias = bias_.data() + first;
    for (int d = 0; d < kHeadDim; ++d) x[d] = x[d] + bias[d];
  }

  void StoreQ(int64_t token, int head, const float* x) const {
    const int64_t index = token * p_.num_heads + head;
    if (p_.q_quant == QQuant::kNone) {
      StoreRow<kDType>(x, kHeadDim, static_cast<T*>(p_.q) + index * kHeadDim);
      return;
    }
    float inverse = q_inverse_;
    if (p_.q_quant == QQuant::kPerTokenHead) {
      const float scale = DynamicScale(AmaxBits(x, kHeadDim), kCacheAmaxFloor, kE4M3Max);
      p_.q_descale[index] = scale;
      inverse = 1.0f / scale;
    }
    EncodeRow<DType::kE4M3>(x, kHeadDim, inverse, static_cast<uint8_t*>(p_.q) + index * kHeadDim);
  }

  const RopeWriteCacheParams& p_;
  const KeyTransform& transform_;
  CacheWriter<Kv> cache_;
  std::vector<float> bias_;
  std::vector<float> q_weight_;
  std::vector<float> k_weight_;
  float q_inverse_;
};

}  // namespace

void RopeWriteCache(const RopeWriteCacheParams& p, const KeyTransform& transform) {
  const std::vector<int> seq_of_token = SeqOfTokens(p.seqs);
  DispatchCache(p.cache, [&](auto format) {
    dispatch<DType::kBFloat16, DType::kFloat16>(p.dtype, "dtype", [&](auto dtype) {
      HeadDims::Dispatch(p.cache.head_dim, [&](auto head_dim) {
        const Writer<decltype(dtype)::value, decltype(format), decltype(head_dim)::value> writer(
            p, transform);
        const int64_t heads = p.num_heads + 2LL * p.cache.num_kv_heads;
        const int64_t work = 2 * heads * p.cache.head_dim;  // rotated and written
        ParallelFor(p.seqs.num_tokens, work, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) writer.Token(t, seq_of_token[t]);
        });
      });
    });
  });
}

}  // namespace fastattn::cpu
