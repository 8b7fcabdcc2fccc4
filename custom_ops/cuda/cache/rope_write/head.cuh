// One head of one token, spread over D / 8 neighbouring lanes of a warp with 8 channels each: load,
// bias, RMSNorm, rotation, quantisation. The bits are those of the CPU kernel: every product and
// sum is rounded by itself, sums over lanes are balanced binary trees of neighbours.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"
#include "cuda/cache/rope_write/launch.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/dynamic_scale.cuh"
#include "cuda/common/vector.cuh"

namespace fastattn::cuda {

// Rounds to kOut (bf16 / fp16); the packed bits are returned, x becomes the rounded values.
template <DType kOut>
__device__ __forceinline__ uint4 RoundTo(float (&x)[kChunk]) {
  Raw<kOut> raw;
  raw.low = make_uint4(PackPair<kOut>(x[0], x[1]), PackPair<kOut>(x[2], x[3]),
                       PackPair<kOut>(x[4], x[5]), PackPair<kOut>(x[6], x[7]));
  Unpack<kOut>(raw, x);
  return raw.low;
}

// One value of a small per-channel parameter whose type is known at run time.
__device__ __forceinline__ float LoadParameter(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return __ldg(static_cast<const float*>(data) + index);
  const uint16_t bits = __ldg(static_cast<const uint16_t*>(data) + index);
  return dtype == DType::kBFloat16 ? BFloat16ToFloat(bits) : Float16ToFloat(bits);
}

__device__ __forceinline__ void AddBias(const void* bias, DType dtype, int64_t channel,
                                        float (&x)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = Add(x[i], LoadParameter(bias, dtype, channel + i));
}

// 1 / sqrt(mean(x^2) + eps) of a head, in all of its lanes.
template <int kHeadDim>
__device__ __forceinline__ float InverseRms(const float (&x)[kChunk], float eps) {
  float sums[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sums[i] = Mul(x[i], x[i]);
#pragma unroll
  for (int n = kChunk / 2; n > 0; n /= 2) {
#pragma unroll
    for (int i = 0; i < n; ++i) sums[i] = Add(sums[2 * i], sums[2 * i + 1]);
  }
  float total = sums[0];
#pragma unroll
  for (int lanes = 1; lanes < kHeadDim / kChunk; lanes *= 2) {
    total = Add(total, __shfl_xor_sync(kFullWarp, total, lanes));
  }
  return Div(1.0f, Sqrt(Add(Div(total, static_cast<float>(kHeadDim)), eps)));
}

// RMSNorm of the heads of a warp that have a weight; heads without one keep x. All lanes of the
// warp take part.
template <int kHeadDim>
__device__ __forceinline__ void RmsNorm(const void* weight, DType dtype, int channel, float eps,
                                        float (&x)[kChunk]) {
  const float inverse = InverseRms<kHeadDim>(x, eps);
  if (weight == nullptr) return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    x[i] = Mul(Mul(x[i], inverse), LoadParameter(weight, dtype, channel + i));
  }
}

// Angles of a lane's channels at one position. Interleaved: 4 pairs; neox: 8 channels.
struct Angles {
  float cos[kChunk];
  float sin[kChunk];
};

__device__ __forceinline__ void LoadAngles(const RopeWriteCacheParams& p, int64_t position,
                                           int channel, Angles& angles) {
  if (p.style == RotaryStyle::kNone || channel >= p.rotary_dim) return;
  const int half = p.rotary_dim / 2;
  const bool neox = p.style == RotaryStyle::kNeox;
  const int64_t row = min(position, p.max_positions - 1) * p.rotary_stride;
  const float* cos = p.cos + row;
  const float* sin = p.sin + row;
  // 16-byte loads where a lane's columns lie side by side and rows keep the alignment.
  const bool aligned =
      p.rotary_step == 1 && p.rotary_stride % 4 == 0 && p.rotary_dim % 16 == 0 &&
      (reinterpret_cast<uintptr_t>(p.cos) | reinterpret_cast<uintptr_t>(p.sin)) % 16 == 0;
  if (aligned) {
    const int first = neox ? (channel < half ? channel : channel - half) : channel / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && !neox) break;
      const float4 c = __ldg(reinterpret_cast<const float4*>(cos + first) + i);
      const float4 s = __ldg(reinterpret_cast<const float4*>(sin + first) + i);
      angles.cos[4 * i] = c.x, angles.cos[4 * i + 1] = c.y;
      angles.cos[4 * i + 2] = c.z, angles.cos[4 * i + 3] = c.w;
      angles.sin[4 * i] = s.x, angles.sin[4 * i + 1] = s.y;
      angles.sin[4 * i + 2] = s.z, angles.sin[4 * i + 3] = s.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int c = channel + i;
    const int pair = neox ? (c < half ? c : c - half) : channel / 2 + i;
    if (neox ? c < p.rotary_dim : (i < kChunk / 2 && pair < half)) {
      angles.cos[i] = __ldg(cos + static_cast<int64_t>(pair) * p.rotary_step);
      angles.sin[i] = __ldg(sin + static_cast<int64_t>(pair) * p.rotary_step);
    }
  }
}

// Neox partners for a rotary_dim that is no multiple of 16: they lie at another index of another
// lane, so every register of that lane is asked for.
__device__ __forceinline__ void GatherPartners(int channel, int half, const float (&x)[kChunk],
                                               float (&other)[kChunk]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int c = channel + i;
    const int partner = c >= 2 * half ? c : (c < half ? c + half : c - half);
    const int source = lane + partner / kChunk - channel / kChunk;
#pragma unroll
    for (int r = 0; r < kChunk; ++r) {
      const float value = __shfl_sync(kFullWarp, x[r], source);
      if (partner % kChunk == r) other[i] = value;
    }
  }
}

// All lanes of the warp take part (neox lanes trade values with the other half's lanes).
__device__ __forceinline__ void Rotate(const RopeWriteCacheParams& p, int channel,
                                       const Angles& angles, float (&x)[kChunk]) {
  if (p.style == RotaryStyle::kInterleaved) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      if (channel + 2 * i < p.rotary_dim) {
        x[2 * i] = Sub(Mul(a, angles.cos[i]), Mul(b, angles.sin[i]));
        x[2 * i + 1] = Add(Mul(a, angles.sin[i]), Mul(b, angles.cos[i]));
      }
    }
  } else if (p.style == RotaryStyle::kNeox) {
    const int half = p.rotary_dim / 2;
    float other[kChunk];
    if (p.rotary_dim % 16 == 0) {
      const int lane = threadIdx.x & 31;
      const int distance = channel >= half ? -half / kChunk : half / kChunk;
      const int partner = channel < p.rotary_dim ? lane + distance : lane;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) other[i] = __shfl_sync(kFullWarp, x[i], partner);
    } else {
      GatherPartners(channel, half, x, other);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (channel + i >= p.rotary_dim) continue;
      const float own = Mul(x[i], angles.cos[i]);
      const float cross = Mul(other[i], angles.sin[i]);
      x[i] = channel + i >= half ? Add(cross, own) : Sub(own, cross);
    }
  }
}

// 8 codes of x[i] * inverse[i], the first in the lowest byte.
template <DType kCode>
__device__ __forceinline__ uint2 Encode(const float (&x)[kChunk], const float (&inverse)[kChunk]) {
  uint32_t words[2];
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = Mul(x[4 * w + i], inverse[4 * w + i]);
    words[w] = PackCodes<kCode>(y[0], y[1], y[2], y[3]);
  }
  return make_uint2(words[0], words[1]);
}

}  // namespace fastattn::cuda
