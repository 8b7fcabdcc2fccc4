// One head of one token, spread over neighbouring lanes of a warp: a lane holds kHalf channels of
// the head's first half and the kHalf channels D / 2 further, so that both partners of a rotation,
// neox or interleaved, are its own. The bits are those of the CPU kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"
#include "common/static_scales.h"
#include "cuda/cache/shared/seq_window.cuh"
#include "cuda/cache/shared/step_traits.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/dynamic_scale.cuh"
#include "params/rope.h"

namespace fastattn::cuda {

constexpr int CeilPowerOfTwo(int x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

template <DType kIn_, int kHeadDim_, int kHalf_>
struct LaneShape {
  static constexpr DType kIn = kIn_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHalf = kHalf_;
  static constexpr int kValues = 2 * kHalf;                     // of a lane
  static constexpr int kWords = kHalf * SizeOf(kIn) / 2;        // the same as words of input
  static constexpr int kCodeWords = kHalf / 2;                  // the same as 8-bit codes
  static constexpr int kDistance = kHeadDim / 2 * SizeOf(kIn);  // bytes between a lane's halves
  static constexpr int kActive = kHeadDim / kValues;            // lanes that have channels
  static constexpr int kLanes = CeilPowerOfTwo(kActive);        // of a head, which exchange by XOR
  static constexpr int kHeads = 32 / kLanes;                    // of a warp
  static_assert(kActive * kValues == kHeadDim, "channels without a lane");

  // Whether a lane has channels. Those of the others are 0, in no tensor, and stored nowhere.
  static __device__ __forceinline__ bool IsActive(int lane) {
    return kActive == kLanes || lane < kActive;
  }
};

// Channel of a lane's i-th value in a LaneShape.
template <typename Lane>
struct HalvesMap {
  static __device__ __forceinline__ int Channel(int lane, int i) {
    return lane * Lane::kHalf + (i < Lane::kHalf ? i : i - Lane::kHalf + Lane::kHeadDim / 2);
  }
};

template <int kBytes>
struct VectorOfBytes;
template <>
struct VectorOfBytes<4> {
  using Type = uint32_t;
};
template <>
struct VectorOfBytes<8> {
  using Type = uint2;
};
template <>
struct VectorOfBytes<16> {
  using Type = uint4;
};

// kWords words to or from two places kDistance bytes apart, half of them each.
template <int kWords, int kDistance>
struct Halves {
  static constexpr int kHalfBytes = 2 * kWords;
  static constexpr int kVectorBytes = kHalfBytes < 16 ? kHalfBytes : 16;
  static constexpr int kVectors = 2 * kHalfBytes / kVectorBytes;
  using Vector = typename VectorOfBytes<kVectorBytes>::Type;

  static constexpr int Offset(int vector) {
    const int at = vector * kVectorBytes;
    return at / kHalfBytes * kDistance + at % kHalfBytes;
  }
};

template <int kWords, int kDistance>
__device__ __forceinline__ void LoadHalves(const void* from, uint32_t (&words)[kWords]) {
  using Shape = Halves<kWords, kDistance>;
  typename Shape::Vector vectors[Shape::kVectors];
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    vectors[i] = *reinterpret_cast<const typename Shape::Vector*>(static_cast<const char*>(from) +
                                                                  Shape::Offset(i));
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(vectors)[i];
}

template <int kWords, int kDistance>
__device__ __forceinline__ void StoreHalves(void* to, const uint32_t (&words)[kWords]) {
  using Shape = Halves<kWords, kDistance>;
  typename Shape::Vector vectors[Shape::kVectors];
#pragma unroll
  for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t*>(vectors)[i] = words[i];
#pragma unroll
  for (int i = 0; i < Shape::kVectors; ++i) {
    *reinterpret_cast<typename Shape::Vector*>(static_cast<char*>(to) + Shape::Offset(i)) =
        vectors[i];
  }
}

template <typename Lane>
__device__ __forceinline__ void UnpackWords(const uint32_t (&words)[Lane::kWords],
                                            float (&x)[Lane::kValues]) {
#pragma unroll
  for (int i = 0; i < Lane::kWords; ++i) {
    if constexpr (Lane::kIn == DType::kFloat32) {
      x[i] = __uint_as_float(words[i]);
    } else if constexpr (Lane::kIn == DType::kBFloat16) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    } else {
      const __half2 pair = *reinterpret_cast<const __half2*>(&words[i]);
      x[2 * i] = __low2float(pair);
      x[2 * i + 1] = __high2float(pair);
    }
  }
}

// Rounded to kOut, 16 bits.
template <DType kOut, int kWords>
__device__ __forceinline__ void PackWords(const float (&x)[2 * kWords], uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = PackPair<kOut>(x[2 * i], x[2 * i + 1]);
}

// Angles of a lane's pairs: neox (kHalf channel i and its partner), else neighbouring channels.
template <typename Lane>
struct LaneAngles {
  float cos[Lane::kHalf];
  float sin[Lane::kHalf];
};

template <int kCount>
__device__ __forceinline__ void LoadFloats(const float* from, float* out) {
  using Vector = typename VectorOfBytes<(kCount > 4 ? 16 : 4 * kCount)>::Type;
  constexpr int kVector = sizeof(Vector) / 4;
#pragma unroll
  for (int i = 0; i < kCount / kVector; ++i) {
    const Vector v = reinterpret_cast<const Vector*>(from)[i];
#pragma unroll
    for (int w = 0; w < kVector; ++w) {
      out[i * kVector + w] = __uint_as_float(reinterpret_cast<const uint32_t*>(&v)[w]);
    }
  }
}

template <typename Lane>
__device__ __forceinline__ void LoadLaneAngles(const RopeWriteCacheParams& p,
                                               const WarpPlace& place, int lane,
                                               LaneAngles<Lane>& angles) {
  if (p.style == RotaryStyle::kNone || !Lane::IsActive(lane)) return;
  const int64_t row = RotaryRow(p, place.batch_idx, place.position);
  if (p.style == RotaryStyle::kNeox) {
    LoadFloats<Lane::kHalf>(p.cos + row + lane * Lane::kHalf, angles.cos);
    LoadFloats<Lane::kHalf>(p.sin + row + lane * Lane::kHalf, angles.sin);
  } else {
    constexpr int kPairs = Lane::kHalf / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t first = row + lane * kPairs + i * (Lane::kHeadDim / 4);
      LoadFloats<kPairs>(p.cos + first, angles.cos + i * kPairs);
      LoadFloats<kPairs>(p.sin + first, angles.sin + i * kPairs);
    }
  }
}

template <typename Lane>
__device__ __forceinline__ void RotateLane(RotaryStyle style, const LaneAngles<Lane>& angles,
                                           float (&x)[Lane::kValues]) {
  if (style == RotaryStyle::kNeox) {
#pragma unroll
    for (int i = 0; i < Lane::kHalf; ++i) {
      const float a = x[i], b = x[i + Lane::kHalf];
      x[i] = Sub(Mul(a, angles.cos[i]), Mul(b, angles.sin[i]));
      x[i + Lane::kHalf] = Add(Mul(a, angles.sin[i]), Mul(b, angles.cos[i]));
    }
  } else if (style == RotaryStyle::kInterleaved) {
#pragma unroll
    for (int i = 0; i < Lane::kHalf; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = Sub(Mul(a, angles.cos[i]), Mul(b, angles.sin[i]));
      x[2 * i + 1] = Add(Mul(a, angles.sin[i]), Mul(b, angles.cos[i]));
    }
  }
}

// The pair with the larger magnitudes of a and b, signs arbitrary; a NaN wins.
template <DType kIn>
__device__ __forceinline__ uint32_t MaxMagnitudes(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
  uint32_t out;
  if constexpr (kIn == DType::kBFloat16) {
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  }
  return out;
#else
  return __vmaxu2(a & 0x7FFF7FFFu, b & 0x7FFF7FFFu);
#endif
}

// x[0] becomes the result of all 2 * kCount. Not a loop: of 16 numbers the compiler kept one, and
// the numbers in local memory.
template <int kCount, typename Combine>
__device__ __forceinline__ void Reduce(uint32_t* x, Combine combine) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = combine(x[i], x[i + kCount]);
  if constexpr (kCount > 1) Reduce<kCount / 2>(x, combine);
}

// Maximum of |x| over a head as fp32 bits, in all of its lanes, which all take part.
template <typename Lane>
__device__ __forceinline__ uint32_t LaneAmaxBits(const uint32_t (&words)[Lane::kWords]) {
  uint32_t m[Lane::kWords];
  constexpr bool kFloats = Lane::kIn == DType::kFloat32;
  const auto larger = [](uint32_t a, uint32_t b) {
    if constexpr (kFloats) {
      return max(a, b);
    } else {
      return MaxMagnitudes<Lane::kIn>(a, b);
    }
  };
#pragma unroll
  for (int i = 0; i < Lane::kWords; ++i) m[i] = kFloats ? words[i] & 0x7FFFFFFFu : words[i];
  Reduce<Lane::kWords / 2>(m, larger);
#pragma unroll
  for (int lanes = 1; lanes < Lane::kLanes; lanes *= 2) {
    m[0] = larger(m[0], __shfl_xor_sync(kFullWarp, m[0], lanes));
  }
  if constexpr (kFloats) {
    return m[0];
  } else if constexpr (Lane::kIn == DType::kBFloat16) {
    return max((m[0] << 16) & 0x7FFF0000u, m[0] & 0x7FFF0000u);
  } else {
    const uint32_t bits = max(m[0] & 0x7FFFu, (m[0] >> 16) & 0x7FFFu);
    return AbsBits(Element<Lane::kIn>::Load(static_cast<uint16_t>(bits)));
  }
}

// __frcp_rn without its call of a subroutine, which costs registers all around it (the same bits
// for every x, checked).
__device__ __forceinline__ float Reciprocal(float x) {
  const uint32_t bits = FloatBits(x), sign = bits & 0x80000000u;
  const uint32_t exponent = AbsBits(x) >> 23;
  if (exponent - 1 < 252) return ReciprocalOfNormal(x);
  if (AbsBits(x) == 0) return BitsFloat(sign | 0x7F800000u);
  if (exponent == 255) return IsNaN(x) ? BitsFloat(0x7FFFFFFFu) : BitsFloat(sign);
  if (exponent == 0) return ReciprocalOfNormal(x * 0x1p64f) * 0x1p64f;
  // From 2^126 on the result is subnormal: 2^(299 - exponent) / mantissa in units of 2^-149.
  const int64_t mantissa = (bits & 0x007FFFFFu) | 0x00800000u;
  const float estimate = fabsf(ReciprocalOfNormal(x * 0x1p-64f)) * 0x1p85f;
  int64_t quotient = static_cast<int>(estimate);
  int64_t rest = (int64_t{1} << (299 - exponent)) - quotient * mantissa;
  if (rest < 0) --quotient, rest += mantissa;
  if (rest >= mantissa) ++quotient, rest -= mantissa;
  if (2 * rest > mantissa || (2 * rest == mantissa && (quotient & 1))) ++quotient;
  return BitsFloat(sign | static_cast<uint32_t>(quotient));
}

// Codes of four scaled values, the first in the lowest byte. kBounded: |x| < 127.5 and no NaN.
template <DType kCode, bool kBounded>
__device__ __forceinline__ uint32_t CodesOf(float a, float b, float c, float d) {
  if constexpr (kCode != DType::kInt8) {
    return PackCodes<kCode>(a, b, c, d);
  } else if constexpr (kBounded) {
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low byte.
    constexpr float kRound = 0x1.8p23f;
    const uint32_t low = __byte_perm(FloatBits(Add(a, kRound)), FloatBits(Add(b, kRound)), 0x0040);
    const uint32_t high = __byte_perm(FloatBits(Add(c, kRound)), FloatBits(Add(d, kRound)), 0x0040);
    return __byte_perm(low, high, 0x5410);
  } else {
    const float x[4] = {a, b, c, d};
    int code[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if __CUDA_ARCH__ >= 800
      float clamped;  // a NaN stays one, and becomes 0
      asm("max.NaN.f32 %0, %1, %2;" : "=f"(clamped) : "f"(x[i]), "f"(-kInt8Max));
      asm("cvt.rni.s32.f32 %0, %1;" : "=r"(code[i]) : "f"(clamped));
#else
      code[i] = FloatToInt8(x[i]);
#endif
    }
    uint32_t high, low;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
        : "=r"(high)
        : "r"(code[3]), "r"(code[2]), "r"(0));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
        : "=r"(low)
        : "r"(code[1]), "r"(code[0]), "r"(high));
    return low;
  }
}

template <typename Lane, DType kCode, bool kBounded>
__device__ __forceinline__ void EncodeLane(const float (&x)[Lane::kValues],
                                           uint32_t (&codes)[Lane::kCodeWords]) {
#pragma unroll
  for (int i = 0; i < Lane::kCodeWords; ++i) {
    codes[i] = CodesOf<kCode, kBounded>(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }
}

template <int kValues>
__device__ __forceinline__ void Scale(float (&x)[kValues], float factor) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = Mul(x[i], factor);
}

// Static scale of a whole head or tensor; asked for before the values are needed.
template <typename Traits>
__device__ __forceinline__ float HeadScale(const PagedCache& cache, const void* scales,
                                           ScaleScheme granularity, int head) {
  if constexpr (Traits::kQuantized && !Traits::Side::kDynamic) {
    if (granularity != ScaleScheme::kChannel) {
      return LoadScale(scales, cache.scale_dtype, HeadScaleIndex(granularity, head));
    }
  }
  return 1.0f;
}

// The reciprocal of a scale, given instead of the scale.
struct Inverse {
  float value;
};

__device__ __forceinline__ float InverseOf(float scale) { return Reciprocal(scale); }
__device__ __forceinline__ float InverseOf(Inverse inverse) { return inverse.value; }

// Q of one head, `words` its rounded values. All lanes of the warp take part.
template <typename Lane>
__device__ __forceinline__ void StoreQuery(const uint32_t (&words)[Lane::kWords],
                                           const RopeWriteCacheParams& p, float static_inverse,
                                           int64_t token, int head, int lane, bool store) {
  // In 32 bits: no GPU holds 2^32 heads of a projection.
  const uint32_t index = static_cast<uint32_t>(token) * static_cast<uint32_t>(p.num_heads) +
                         static_cast<uint32_t>(head);
  const uint64_t element = static_cast<uint64_t>(index) * Lane::kHeadDim + lane * Lane::kHalf;
  const bool stores = store && Lane::IsActive(lane);
  if (p.q_quant == QQuant::kNone) {
    if (stores) {
      StoreHalves<Lane::kWords, Lane::kHeadDim>(static_cast<uint16_t*>(p.q) + element, words);
    }
    return;
  }
  float inverse = static_inverse;
  if (p.q_quant == QQuant::kPerTokenHead) {
    const float scale = FastDynamicScale(LaneAmaxBits<Lane>(words), kCacheAmaxFloor, kE4M3Max);
    if (store && lane == 0) p.q_descale[index] = scale;
    inverse = ReciprocalOfNormal(scale);
  }
  float x[Lane::kValues];
  UnpackWords<Lane>(words, x);
  Scale(x, inverse);
  uint32_t codes[Lane::kCodeWords];
  EncodeLane<Lane, DType::kE4M3, true>(x, codes);
  if (stores) {
    StoreHalves<Lane::kCodeWords, Lane::kHeadDim / 2>(static_cast<uint8_t*>(p.q) + element, codes);
  }
}

}  // namespace fastattn::cuda
