// What a head in the lanes of a warp goes through before it is rounded: bias, rotation, RMSNorm.
// The bits are those of the CPU kernel: every product and sum is rounded by itself, sums over
// channels are balanced binary trees of neighbours.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/exact.h"
#include "common/numeric.h"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/common/inverse_rms.cuh"

namespace fastattn::cuda {

// One value of a per-channel parameter whose type is known at run time.
__device__ __forceinline__ float LoadParameter(const void* data, DType dtype, int index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kBFloat16 ? BFloat16ToFloat(bits) : Float16ToFloat(bits);
}

// Two values of a 16-bit type known at run time.
__device__ __forceinline__ void UnpackPair(DType dtype, uint32_t word, float* out) {
  if (dtype == DType::kBFloat16) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xFFFF0000u);
  } else {
    const __half2 pair = *reinterpret_cast<const __half2*>(&word);
    out[0] = __low2float(pair);
    out[1] = __high2float(pair);
  }
}

// kCount neighbouring ones. Without kAny they lie at a multiple of min(16 bytes, their size).
template <bool kAny, int kCount>
__device__ __forceinline__ void LoadParameters(const void* data, DType dtype, int index,
                                               float* out) {
  if (kAny && reinterpret_cast<uintptr_t>(data) % 16 != 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = LoadParameter(data, dtype, index + i);
  } else if (dtype == DType::kFloat32) {
    LoadFloats<kCount>(static_cast<const float*>(data) + index, out);
  } else {
    using Vector = typename VectorOfBytes<2 * kCount>::Type;
    const Vector vector =
        *reinterpret_cast<const Vector*>(static_cast<const uint16_t*>(data) + index);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      UnpackPair(dtype, reinterpret_cast<const uint32_t*>(&vector)[i], out + 2 * i);
    }
  }
}

// A lane's channels of a parameter as they lie in memory: a load is not waited for before its
// values are unpacked, so that other loads can follow it. 16-bit values take half of the words (of
// each half of the head).
template <typename Traits, typename Lane>
struct RawParameters {
  uint32_t words[Lane::kValues];
  bool pairs;  // of 16-bit values, else every value has its word

  // Channels of any map, a load each.
  template <typename Map>
  __device__ __forceinline__ void LoadEach(const void* data, DType dtype, int first, int lane) {
    pairs = false;
    const auto exists = [&](int i) {
      return Lane::kActive == Lane::kLanes || Map::Channel(lane, i) < Lane::kHeadDim;
    };
    if (dtype == DType::kFloat32) {
      const uint32_t* from = static_cast<const uint32_t*>(data) + first;
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i)
        words[i] = exists(i) ? from[Map::Channel(lane, i)] : 0;
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(data) + first;
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i)
        words[i] = exists(i) ? from[Map::Channel(lane, i)] : 0;
    }
  }

  // Those of HalvesMap.
  __device__ __forceinline__ void Load(const void* data, DType dtype, int first, int lane) {
    pairs = dtype != DType::kFloat32;
    if (Traits::Options::kAny && reinterpret_cast<uintptr_t>(data) % 16 != 0) {
      LoadEach<HalvesMap<Lane>>(data, dtype, first, lane);
      if (!Lane::IsActive(lane)) {
#pragma unroll
        for (int i = 0; i < Lane::kValues; ++i) words[i] = 0;
      }
    } else {
      const bool active = Lane::IsActive(lane);
      if (!active) lane = 0;
      // Both types by the same loads, without a branch: 16-bit values twice.
      constexpr int kBytes = 2 * Lane::kHalf;
      using Vector = typename VectorOfBytes<kBytes>::Type;
      const int size = pairs ? 2 : 4;
      const char* from =
          static_cast<const char*>(data) + static_cast<int64_t>(first + lane * Lane::kHalf) * size;
      Vector vectors[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        vectors[i] = *reinterpret_cast<const Vector*>(from + i / 2 * (Lane::kHeadDim / 2) * size +
                                                      (pairs ? 0 : i % 2 * kBytes));
      }
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) {
        words[i] = active ? reinterpret_cast<const uint32_t*>(vectors)[i] : 0;
      }
    }
  }

  __device__ __forceinline__ void Unpack(DType dtype, float (&out)[Lane::kValues]) const {
    if (dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) out[i] = __uint_as_float(words[i]);
    } else if (pairs) {
#pragma unroll
      for (int i = 0; i < Lane::kHalf; ++i) {
        constexpr int kPairs = Lane::kHalf / 2;
        UnpackPair(dtype, words[i / kPairs * Lane::kHalf + i % kPairs], out + 2 * i);
      }
    } else if (dtype == DType::kBFloat16) {
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) out[i] = __uint_as_float(words[i] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) {
        out[i] = Float16ToFloat(static_cast<uint16_t>(words[i]));
      }
    }
  }
};

template <typename Options>
__device__ __forceinline__ bool HasBias(const RopeWriteCacheParams& p) {
  return Options::kBias && (!Options::kAsked || p.bias != nullptr);
}

// + bias of a head, counted over [Q heads, K heads, V heads].
template <typename Traits, typename Lane>
__device__ __forceinline__ void AddBias(const RopeWriteCacheParams& p, int fused_head, int lane,
                                        float (&x)[Lane::kValues]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (!Lane::IsActive(lane)) return;
    float bias[Lane::kHalf];
    asm volatile("" ::: "memory");  // a half at a time: registers
    LoadParameters<Traits::Options::kAny, Lane::kHalf>(
        p.bias, p.bias_dtype,
        fused_head * Lane::kHeadDim + half * (Lane::kHeadDim / 2) + lane * Lane::kHalf, bias);
#pragma unroll
    for (int i = 0; i < Lane::kHalf; ++i) {
      x[half * Lane::kHalf + i] = Add(x[half * Lane::kHalf + i], bias[i]);
    }
  }
}

// RMSNorm; `weight` gives a half's weights.
template <typename Lane, typename Weight>
__device__ __forceinline__ void NormLane(float eps, Weight&& weight, float (&x)[Lane::kValues]) {
  const float inverse = InverseRms<Lane>(x, eps);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float w[Lane::kHalf];
    asm volatile("" ::: "memory");  // a half's weights at a time: registers
    weight(half, w);
#pragma unroll
    for (int i = 0; i < Lane::kHalf; ++i) {
      float& value = x[half * Lane::kHalf + i];
      value = Mul(Mul(value, inverse), w[i]);
    }
  }
}

// The norm of a Q or K head, as it is asked for: which weights, if any.
template <typename Traits, typename Lane>
struct HeadNorm {
  const void* weight;
  DType dtype;
  float eps;
  int lane;

  __device__ __forceinline__ HeadNorm(const RopeWriteCacheParams& p, bool is_q, int lane)
      : weight(is_q ? p.q_norm_weight : p.k_norm_weight),
        dtype(is_q ? p.q_norm_dtype : p.k_norm_dtype),
        eps(p.rms_norm_eps),
        lane(lane) {}

  __device__ __forceinline__ void LoadWeights(int half, float (&w)[Lane::kHalf]) const {
    const int own = Lane::IsActive(lane) ? lane : 0;  // a product with 0 else
    LoadParameters<Traits::Options::kAny, Lane::kHalf>(
        weight, dtype, half * (Lane::kHeadDim / 2) + own * Lane::kHalf, w);
  }

  // All lanes of the warp take part; they ask for the same weights.
  __device__ __forceinline__ void operator()(float (&x)[Lane::kValues]) const {
    if (weight == nullptr) return;
    NormLane<Lane>(eps, [&](int half, float (&w)[Lane::kHalf]) { LoadWeights(half, w); }, x);
  }
};

// The norms' weights in shared memory, as floats, where every lane finds its own without a
// conversion; they lie at multiples of 16 bytes (not kAny). A warp has its copy, so that it waits
// for no other.
template <typename Lane, int kWarps>
struct SharedNorm {
  // Of Q's weights, those of lanes without channels included, then as many of K's.
  static constexpr int kQuads = Lane::kLanes * Lane::kValues / 4;
  static constexpr int kLoads = (2 * kQuads + 31) / 32;  // of a lane

  uint4 quads[kLoads];  // as they lie in memory, nothing waits for them; 16-bit ones take half
  bool floats[kLoads];

  // A half's i-th quads of all lanes lie side by side.
  static __device__ __forceinline__ int Quad(int lane, int half, int i) {
    return (half * (Lane::kHalf / 4) + i) * Lane::kLanes + lane;
  }
  static __device__ __forceinline__ float4* Space() {
    __shared__ float4 spaces[kWarps][2 * kQuads];
    return spaces[threadIdx.x / 32];
  }

  __device__ __forceinline__ void Load(const RopeWriteCacheParams& p) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int quad = threadIdx.x % 32 + i * 32;
      const bool is_q = quad < kQuads;
      const void* weight = is_q ? p.q_norm_weight : p.k_norm_weight;
      const int lane = quad % Lane::kLanes, at = quad % kQuads / Lane::kLanes;
      constexpr int kQuadsOfHalf = Lane::kHalf / 4;
      const int channel =
          at / kQuadsOfHalf * (Lane::kHeadDim / 2) + lane * Lane::kHalf + at % kQuadsOfHalf * 4;
      const DType dtype = is_q ? p.q_norm_dtype : p.k_norm_dtype;
      quads[i] = {};
      floats[i] = dtype == DType::kFloat32;
      if (quad >= 2 * kQuads || weight == nullptr || !Lane::IsActive(lane)) continue;
      if (floats[i]) {
        quads[i] = *reinterpret_cast<const uint4*>(static_cast<const float*>(weight) + channel);
      } else {
        const uint2 pairs =
            *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(weight) + channel);
        quads[i].x = pairs.x, quads[i].y = pairs.y;
      }
    }
  }

  // All lanes of the warp take part.
  __device__ __forceinline__ void Store(const RopeWriteCacheParams& p) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int quad = threadIdx.x % 32 + i * 32;
      const uint4 raw = quads[i];
      float w[4];
      if (floats[i]) {
        w[0] = BitsFloat(raw.x), w[1] = BitsFloat(raw.y);
        w[2] = BitsFloat(raw.z), w[3] = BitsFloat(raw.w);
      } else {
        const DType dtype = quad < kQuads ? p.q_norm_dtype : p.k_norm_dtype;
        UnpackPair(dtype, raw.x, w);
        UnpackPair(dtype, raw.y, w + 2);
      }
      if (quad < 2 * kQuads) Space()[quad] = make_float4(w[0], w[1], w[2], w[3]);
    }
    __syncwarp();
  }

  // RMSNorm of a Q or K head, if there is one. All lanes of the warp take part.
  static __device__ __forceinline__ void Apply(const RopeWriteCacheParams& p, bool is_q, int lane,
                                               float (&x)[Lane::kValues]) {
    if ((is_q ? p.q_norm_weight : p.k_norm_weight) == nullptr) return;
    const float4* space = Space() + (is_q ? 0 : kQuads);
    const auto weight = [&](int half, float (&w)[Lane::kHalf]) {
#pragma unroll
      for (int i = 0; i < Lane::kHalf / 4; ++i) {
        const float4 quad = space[Quad(lane, half, i)];
        w[4 * i] = quad.x, w[4 * i + 1] = quad.y, w[4 * i + 2] = quad.z, w[4 * i + 3] = quad.w;
      }
    };
    NormLane<Lane>(p.rms_norm_eps, weight, x);
  }
};

// The rotation of whole heads, or none.
template <typename Lane>
struct WholeRotation {
  LaneAngles<Lane> angles = {};

  // Of a token that has a place.
  __device__ __forceinline__ void Load(const RopeWriteCacheParams& p, const WarpPlace& place,
                                       int lane) {
    LoadLaneAngles<Lane>(p, place, lane, angles);
  }
  __device__ __forceinline__ void Apply(const RopeWriteCacheParams& p, int lane,
                                        float (&x)[Lane::kValues]) const {
    RotateLane<Lane>(p.style, angles, x);
  }
};

// The rotation of a head's first channels, at most half of them (IsPartialRope). Interleaved
// partners are a lane's own values, of its first half; neox partners are those of one other lane.
template <typename Lane>
struct PartialRotation {
  LaneAngles<Lane> angles = {};

  static __device__ __forceinline__ bool Rotates(const RopeWriteCacheParams& p, int lane) {
    return lane * Lane::kHalf < p.rotary_dim && Lane::IsActive(lane);
  }

  __device__ __forceinline__ void Load(const RopeWriteCacheParams& p, const WarpPlace& place,
                                       int lane) {
    if (!Rotates(p, lane)) return;
    const int64_t row = RotaryRow(p, place.batch_idx, place.position);
    if (p.style == RotaryStyle::kNeox) {
      const int half = p.rotary_dim / 2;
      const int channel = lane * Lane::kHalf;
      const bool second = channel >= half;
      const int64_t first = row + (second ? channel - half : channel);
      LoadFloats<Lane::kHalf>(p.cos + first, angles.cos);
      LoadFloats<Lane::kHalf>(p.sin + first, angles.sin);
    } else {
      constexpr int kPairs = Lane::kHalf / 2;
      LoadFloats<kPairs>(p.cos + row + lane * kPairs, angles.cos);
      LoadFloats<kPairs>(p.sin + row + lane * kPairs, angles.sin);
    }
  }

  // All lanes of the warp take part.
  __device__ __forceinline__ void Apply(const RopeWriteCacheParams& p, int lane,
                                        float (&x)[Lane::kValues]) const {
    const bool rotates = Rotates(p, lane);
    if (p.style == RotaryStyle::kNeox) {
      const int half = p.rotary_dim / 2;
      const int distance = half / Lane::kHalf;
      const uint32_t sign = lane * Lane::kHalf < half ? 0x80000000u : 0;
#pragma unroll
      for (int i = 0; i < Lane::kHalf; ++i) {
        const float other = __shfl_xor_sync(kFullWarp, x[i], distance);
        const float sin = BitsFloat(FloatBits(angles.sin[i]) ^ sign);
        const float turned = Add(Mul(x[i], angles.cos[i]), Mul(other, sin));
        x[i] = rotates ? turned : x[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < Lane::kHalf; i += 2) {
        const float a = x[i], b = x[i + 1];
        const float cos = angles.cos[i / 2], sin = angles.sin[i / 2];
        x[i] = rotates ? Sub(Mul(a, cos), Mul(b, sin)) : a;
        x[i + 1] = rotates ? Add(Mul(a, sin), Mul(b, cos)) : b;
      }
    }
  }
};

// What a warp's lanes tell each other where a rotation's partners lie anywhere.
template <typename Lane>
struct RotationSpace {
  // Large heads have the angles of pairs only: shared memory is short.
  static constexpr bool kPairs = Lane::kHeadDim > 128;
  static constexpr int kAngles = kPairs ? Lane::kHeadDim / 2 : Lane::kHeadDim;
  alignas(16) float values[Lane::kHeads][Lane::kHeadDim];
  alignas(16) float cos[kAngles];  // of a channel; its sine has the sign of its partner
  alignas(16) float sin[kAngles];
};

// Any rotation of a head's first channels by any table. Partners are a lane's own values
// (interleaved, or neox of whole heads), those of one other lane (neox of a power of 2 of at most
// half the channels), or go through shared memory.
template <typename Lane, int kWarps>
struct AnyRotation {
  enum class Partner { kNone, kNeighbour, kOtherHalf, kOtherLane, kAnywhere };

  LaneAngles<Lane> angles = {};

  static __device__ __forceinline__ Partner PartnerOf(const RopeWriteCacheParams& p) {
    if (p.style == RotaryStyle::kNone) return Partner::kNone;
    if (p.style == RotaryStyle::kInterleaved) return Partner::kNeighbour;
    const int half = p.rotary_dim / 2;
    if (p.rotary_dim == Lane::kHeadDim) return Partner::kOtherHalf;
    const bool power = (half & (half - 1)) == 0 &&
                       (Lane::kActive == Lane::kLanes || 2 * p.rotary_dim <= Lane::kHeadDim);
    return power && half >= Lane::kHalf ? Partner::kOtherLane : Partner::kAnywhere;
  }

  static __device__ __forceinline__ RotationSpace<Lane>& Space() {
    __shared__ RotationSpace<Lane> spaces[kWarps];
    return spaces[threadIdx.x / 32];
  }

  // Channel of the first of interleaved pair i of a lane.
  static __device__ __forceinline__ int PairChannel(int lane, int i) {
    return HalvesMap<Lane>::Channel(lane, 2 * i);
  }

  // Of a token that has a place. All lanes of the warp take part: they hold the same one.
  __device__ __forceinline__ void Load(const RopeWriteCacheParams& p, const WarpPlace& place,
                                       int lane) {
    const Partner partner = PartnerOf(p);
    if (partner == Partner::kNone) return;
    const int64_t row = RotaryRow(p, place.batch_idx, place.position);
    const float* cos = p.cos + row;
    const float* sin = p.sin + row;
    const int half = p.rotary_dim / 2;
    if (partner == Partner::kAnywhere) {
      RotationSpace<Lane>& space = Space();
      for (int c = threadIdx.x % 32; c < (space.kPairs ? half : p.rotary_dim); c += 32) {
        const int column = (c < half ? c : c - half) * p.rotary_step;
        space.cos[c] = cos[column];
        space.sin[c] = c < half ? -sin[column] : sin[column];
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < Lane::kHalf; ++i) {
      int pair = lane * Lane::kHalf + i;
      if (partner == Partner::kNeighbour) pair = PairChannel(lane, i) / 2;
      const bool second = partner == Partner::kOtherLane && pair >= half;
      if (second) pair -= half;
      if (pair >= half) continue;
      const float s = sin[pair * p.rotary_step];
      angles.cos[i] = cos[pair * p.rotary_step];
      angles.sin[i] = partner == Partner::kOtherLane && !second ? -s : s;
    }
  }

  // All lanes of the warp take part.
  __device__ __forceinline__ void Apply(const RopeWriteCacheParams& p, int lane,
                                        float (&x)[Lane::kValues]) const {
    const Partner partner = PartnerOf(p);
    if (partner == Partner::kNeighbour) {
      float y[Lane::kValues];
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) y[i] = x[i];
      RotateLane<Lane>(RotaryStyle::kInterleaved, angles, y);
#pragma unroll
      for (int i = 0; i < Lane::kValues; ++i) {
        if (PairChannel(lane, i / 2) < p.rotary_dim) x[i] = y[i];
      }
    } else if (partner == Partner::kOtherHalf) {
      RotateLane<Lane>(RotaryStyle::kNeox, angles, x);
    } else if (partner == Partner::kOtherLane) {
      const int distance = p.rotary_dim / 2 / Lane::kHalf;
      const bool rotated = lane < 2 * distance;
#pragma unroll
      for (int i = 0; i < Lane::kHalf; ++i) {
        const float other = __shfl_xor_sync(kFullWarp, x[i], distance);
        const float turned = Add(Mul(x[i], angles.cos[i]), Mul(other, angles.sin[i]));
        if (rotated) x[i] = turned;
      }
    } else if (partner == Partner::kAnywhere) {
      RotateAnywhere(p, lane, x);
    }
  }

  static __device__ __forceinline__ void RotateAnywhere(const RopeWriteCacheParams& p, int lane,
                                                        float (&x)[Lane::kValues]) {
    RotationSpace<Lane>& space = Space();
    float* values = space.values[threadIdx.x % 32 / Lane::kLanes];
    const int half = p.rotary_dim / 2;
    __syncwarp();  // the last head's values have been read
#pragma unroll
    for (int i = 0; i < Lane::kValues; i += 4) {
      if (!Lane::IsActive(lane)) break;
      *reinterpret_cast<float4*>(values + HalvesMap<Lane>::Channel(lane, i)) =
          make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
    }
    __syncwarp();
    if (!Lane::IsActive(lane)) return;
#pragma unroll
    for (int i = 0; i < Lane::kValues; i += 4) {
      const int channel = HalvesMap<Lane>::Channel(lane, i);
      if (channel >= p.rotary_dim) continue;
      float cos[4], sin[4], other[4];
      if constexpr (space.kPairs) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = min(channel + j, p.rotary_dim - 1);
          const int pair = c < half ? c : c - half;
          cos[j] = space.cos[pair];
          sin[j] = c < half ? space.sin[pair] : -space.sin[pair];
        }
      } else {
        LoadFloats<4>(space.cos + channel, cos);
        LoadFloats<4>(space.sin + channel, sin);
      }
      if (half % 4 == 0) {  // four partners side by side
        LoadFloats<4>(values + (channel < half ? channel + half : channel - half), other);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = min(channel + j, p.rotary_dim - 1);
          other[j] = values[c < half ? c + half : c - half];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float turned = Add(Mul(x[i + j], cos[j]), Mul(other[j], sin[j]));
        if (channel + j < p.rotary_dim) x[i + j] = turned;
      }
    }
  }
};

template <typename Traits, typename Lane, int kWarps>
using LaneRotation = std::conditional_t<
    Traits::Options::kAny, AnyRotation<Lane, kWarps>,
    std::conditional_t<Traits::Options::kPartial, PartialRotation<Lane>, WholeRotation<Lane>>>;

// Rotation and norm of a Q or K head in the order asked for; `norm` normalises x. All lanes of the
// warp take part. kFewRegisters: a loop of two rounds has the norm's code once, where that of both
// orders side by side spills.
template <typename Traits, typename Lane, bool kFewRegisters, typename Rotation, typename Norm>
__device__ __forceinline__ void TransformLane(const RopeWriteCacheParams& p,
                                              const Rotation& rotation, int lane, Norm&& norm,
                                              float (&x)[Lane::kValues]) {
  if constexpr (!Traits::Options::kNorm) {
    rotation.Apply(p, lane, x);
  } else if constexpr (kFewRegisters) {
    const int norm_round = p.norm_before_rope ? 0 : 1;
#pragma unroll 1
    for (int round = 0; round < 2; ++round) {
      if (round == norm_round) {
        norm(x);
      } else {
        rotation.Apply(p, lane, x);
      }
    }
  } else {
    if (p.norm_before_rope) norm(x);
    rotation.Apply(p, lane, x);
    if (!p.norm_before_rope) norm(x);
  }
}

}  // namespace fastattn::cuda
