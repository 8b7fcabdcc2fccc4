#include "cpu/rope_write_cache.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/dispatch.h"
#include "common/numeric.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "cpu/token_rows.h"

namespace fastattn::cpu {

namespace {

// A per-channel parameter in fp32; empty when there is none.
std::vector<float> Widened(const void* data, DType dtype, int64_t n) {
  std::vector<float> result(data == nullptr ? 0 : n);
  if (data == nullptr) return result;
  dispatch<DType::kFloat32, DType::kBFloat16, DType::kFloat16>(dtype, "dtype", [&](auto type) {
    using E = Element<decltype(type)::value>;
    const auto* x = static_cast<const typename E::Storage*>(data);
    for (int64_t i = 0; i < n; ++i) result[i] = E::Load(x[i]);
  });
  return result;
}

// Columns of the rotary table for one position, one value a pair.
struct Angles {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
};

void LoadAngles(const RopeWriteCacheParams& p, int64_t position, Angles& angles) {
  const int64_t row = std::min(position, p.max_positions - 1) * p.rotary_stride;
  for (int i = 0; i < p.rotary_dim / 2; ++i) {
    angles.cos[i] = p.cos[row + static_cast<int64_t>(i) * p.rotary_step];
    angles.sin[i] = p.sin[row + static_cast<int64_t>(i) * p.rotary_step];
  }
}

// Two products and one sum for each channel, without contraction: the order is the definition.
void Rotate(const RopeWriteCacheParams& p, const Angles& angles, float* x) {
  const int half = p.rotary_dim / 2;
  const bool neox = p.style == RotaryStyle::kNeox;
  const int step = neox ? 1 : 2;
  const int distance = neox ? half : 1;
  for (int i = 0; i < half; ++i) {
    float& a = x[i * step];
    float& b = x[i * step + distance];
    const float first = a * angles.cos[i] - b * angles.sin[i];
    b = a * angles.sin[i] + b * angles.cos[i];
    a = first;
  }
}

// (x * (1 / sqrt(mean(x^2) + eps))) * weight. The squares are summed as a balanced binary tree of
// neighbours: any split of a head over threads in power-of-two runs gives the same bits.
template <int kHeadDim>
void RmsNorm(const float* weight, float eps, float* x) {
  float sums[kHeadDim];
  for (int i = 0; i < kHeadDim; ++i) sums[i] = x[i] * x[i];
  for (int n = kHeadDim / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  const float mean = sums[0] / static_cast<float>(kHeadDim);
  const float inverse = 1.0f / std::sqrt(mean + eps);
  for (int i = 0; i < kHeadDim; ++i) x[i] = (x[i] * inverse) * weight[i];
}

template <DType kDType, typename Format, int kHeadDim>
class Writer {
  using E = Element<kDType>;
  using T = typename E::Storage;

 public:
  explicit Writer(const RopeWriteCacheParams& p)
      : p_(p),
        cache_(p.cache),
        bias_(Widened(p.bias, p.bias_dtype, (p.num_heads + 2LL * p.cache.num_kv_heads) * kHeadDim)),
        q_weight_(Widened(p.q_norm_weight, p.q_norm_dtype, kHeadDim)),
        k_weight_(Widened(p.k_norm_weight, p.k_norm_dtype, kHeadDim)),
        q_inverse_(p.q_quant == QQuant::kPerTensor ? 1.0f / p.q_scale[0] : 0.0f) {}

  // row: the token's row, or -1 for a token that is skipped.
  void Token(int64_t token, int row) const {
    float x[kHeadDim];
    if (row < 0) {
      std::fill_n(x, kHeadDim, 0.0f);
      for (int head = 0; head < p_.num_heads; ++head) StoreQ(token, head, x);
      return;
    }
    const int64_t position = PositionOf(p_.rows, row, token);
    Angles angles;
    if (p_.style != RotaryStyle::kNone) LoadAngles(p_, position, angles);
    for (int head = 0; head < p_.num_heads; ++head) {
      Load(token, head, x);
      Transform(angles, q_weight_, x);
      StoreQ(token, head, x);
    }
    const int block =
        BlockOf(p_.rows.block_tables, p_.rows.max_blocks, p_.cache.num_blocks, row, position);
    if (block < 0) return;
    const int slot = static_cast<int>(position % kBlockSize);
    for (int head = 0; head < p_.cache.num_kv_heads; ++head) {
      Load(token, p_.num_heads + head, x);
      Transform(angles, k_weight_, x);
      cache_.Key(block, head, slot, x);
      Load(token, p_.num_heads + p_.cache.num_kv_heads + head, x);
      Round(x);
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

  void Transform(const Angles& angles, const std::vector<float>& weight, float* x) const {
    const bool norm = !weight.empty();
    if (norm && p_.norm_before_rope) RmsNorm<kHeadDim>(weight.data(), p_.rms_norm_eps, x);
    if (p_.style != RotaryStyle::kNone) Rotate(p_, angles, x);
    if (norm && !p_.norm_before_rope) RmsNorm<kHeadDim>(weight.data(), p_.rms_norm_eps, x);
    Round(x);
  }

  // To the type of qkv and back: what is quantised is what an unfused write would read.
  static void Round(float* x) {
    for (int d = 0; d < kHeadDim; ++d) x[d] = E::Load(E::Store(x[d]));
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
  CacheWriter<Format> cache_;
  std::vector<float> bias_;
  std::vector<float> q_weight_;
  std::vector<float> k_weight_;
  float q_inverse_;
};

}  // namespace

void RopeWriteCache(const RopeWriteCacheParams& p) {
  const std::vector<int> row_of_token = RowOfTokens(p.rows);
  DispatchCache(p.cache, [&](auto format) {
    dispatch<DType::kBFloat16, DType::kFloat16>(p.dtype, "dtype", [&](auto dtype) {
      dispatch<64, 128>(p.cache.head_dim, "head_dim", [&](auto head_dim) {
        const Writer<decltype(dtype)::value, decltype(format), decltype(head_dim)::value> writer(p);
        ParallelFor(p.rows.num_tokens, 4, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) writer.Token(t, row_of_token[t]);
        });
      });
    });
  });
}

}  // namespace fastattn::cpu
