// What happens to a head between the fused projection and the cache: rotation and RMSNorm in fp32,
// and one rounding.
#pragma once

#include <vector>

#include "common/dispatch.h"
#include "cpu/cache_codec.h"
#include "cpu/convert.h"
#include "cpu/inverse_rms.h"
#include "params/rope.h"

namespace fastattn::cpu {

// A per-channel parameter in fp32; empty when there is none.
inline std::vector<float> Widened(const void* data, DType dtype, int64_t n) {
  std::vector<float> result(data == nullptr ? 0 : n);
  if (data == nullptr) return result;
  dispatch<DType::kFloat32, DType::kBFloat16, DType::kFloat16>(dtype, "dtype", [&](auto type) {
    using E = Element<decltype(type)::value>;
    const auto* x = static_cast<const typename E::Storage*>(data);
    for (int64_t i = 0; i < n; ++i) result[i] = E::Load(x[i]);
  });
  return result;
}

// Columns of the rotary table for one token, one value a pair.
struct Angles {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
};

inline void LoadAngles(const RopeWriteCacheParams& p, int batch_idx, int64_t position,
                       Angles& angles) {
  const int64_t row = RotaryRow(p, batch_idx, static_cast<uint32_t>(position));
  for (int i = 0; i < p.rotary_dim / 2; ++i) {
    angles.cos[i] = p.cos[row + static_cast<int64_t>(i) * p.rotary_step];
    angles.sin[i] = p.sin[row + static_cast<int64_t>(i) * p.rotary_step];
  }
}

// Two products and one sum for each channel, without contraction: the order is the definition.
inline void Rotate(const RopeWriteCacheParams& p, const Angles& angles, float* x) {
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

// (x * (1 / sqrt(mean(x^2) + eps))) * weight
template <int kHeadDim>
void RmsNorm(const float* weight, float eps, float* x) {
  const float inverse = InverseRms<kHeadDim>(eps, x);
  for (int i = 0; i < kHeadDim; ++i) x[i] = (x[i] * inverse) * weight[i];
}

// Rounds to the type of qkv, so that what is quantised is what an unfused write would read.
template <DType kDType>
void RoundRow(float* x, int n) {
  using E = Element<kDType>;
  for (int d = 0; d < n; ++d) x[d] = E::Load(E::Store(x[d]));
}

// Rotation and norm of a Q or K head, in the order asked for, and the rounding.
template <DType kDType, int kHeadDim>
void TransformHead(const RopeWriteCacheParams& p, const Angles& angles,
                   const std::vector<float>& weight, float* x) {
  const bool norm = !weight.empty();
  if (norm && p.norm_before_rope) RmsNorm<kHeadDim>(weight.data(), p.rms_norm_eps, x);
  if (p.style != RotaryStyle::kNone) Rotate(p, angles, x);
  if (norm && !p.norm_before_rope) RmsNorm<kHeadDim>(weight.data(), p.rms_norm_eps, x);
  RoundRow<kDType>(x, kHeadDim);
}

}  // namespace fastattn::cpu
