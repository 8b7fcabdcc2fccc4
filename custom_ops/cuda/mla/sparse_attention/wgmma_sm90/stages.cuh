// Stages of keys, and keys of 8-bit codes on their way there: what producers (gather.cuh) and
// consumers of sparse latent attention share.
#pragma once

#include <cstdint>

#include "cuda/common/convert.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/scaling.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

// What producers and consumers share of a stage.
template <int kDim, int kStages>
struct Stages {
  uint8_t keys[kStages][kDim / 64 * kBlockBytes];
};

// In which a CTA of a pair converts its half of a tile.
inline constexpr int kPairPasses = 2;

// Key tiles that are ready, and stages that are free.
template <int kStages>
struct StageBarriers {
  // Half 0: keys 0 to 31. Halves are 16 bytes, which a bulk copy takes.
  uint4 valid[kStages][2];       // byte i: bit k: key 4 * i + k of the half exists
  float powers[kStages][kKeys];  // what fp16 keys were divided by; 0: masked
  uint64_t full[kStages];
  uint64_t empty[kStages][2];  // of a half; of a pair's CTA: [0]: its half, in both CTAs
  // Of a pair: a pass of the half that this CTA gathers is there.
  uint64_t own[kStages][kPairPasses];
};

// Whether all keys of a tile exist.
__device__ __forceinline__ bool AllValid(const uint4& valid) {
  return (valid.x & valid.y & valid.z & valid.w) == 0x0F0F0F0Fu;
}

// Of both halves.
__device__ __forceinline__ uint4 ValidOf(const uint4 (&halves)[2]) {
  const uint2 low = *reinterpret_cast<const uint2*>(&halves[0]);
  const uint2 high = *reinterpret_cast<const uint2*>(&halves[1]);
  return make_uint4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ uint4 LoadShared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void StoreShared(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// One lane's share of a key: 16 codes of each 128, and 16 bytes of what follows.
struct KeyPart {
  uint4 codes[4];
  uint4 rope;
  uint2 scales;  // fp32 scale lane % 4, all exponents, or whether the key exists
};

// A scale as the sum of two fp16 numbers, the larger one in the low half.
__device__ __forceinline__ uint32_t SplitScale(float scale) {
  const float high = __half2float(__float2half_rn(scale));
  return PackPair<DType::kFloat16>(high, scale - high);
}

// 16 codes times a scale, in fp16. kExact: fp16 holds the scale. Else the product is rounded once
// but for what the product with the scale's smaller part loses.
template <bool kExact>
__device__ __forceinline__ void Dequantize(const uint4& codes, uint32_t scale, uint4 (&out)[2]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  const __half2 both = *reinterpret_cast<const __half2*>(&scale);
  const __half2 high = __low2half2(both), low = __high2half2(both);
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
    const __half2 code(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3));
    const __half2 x = kExact ? __hmul2(code, high) : __hfma2(code, high, __hmul2(code, low));
    pairs[i] = *reinterpret_cast<const uint32_t*>(&x);
  }
  out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

// 2^(exponent - 127); 255 is NaN.
__device__ __forceinline__ float PowerOfTwo(uint32_t exponent) {
  const uint32_t special = exponent == 0 || exponent == 255 ? 1u << 22 : 0;
  return __uint_as_float(exponent << 23 | special);
}

// Arrivals at `full` of a stage that kWarps fill.
template <MlaFormat kFormat, int kWarps>
inline constexpr int kFullArrivals =
    kWarps * (kWarpArrivals + (kFormat == MlaFormat::kBf16 ? 32 : 0));

// Waits for a tile. Consumers order what producers stored before the tensor cores' accesses: in a
// producer the fence would wait for its copies of the next tile.
__device__ __forceinline__ void WaitTile(uint64_t* full, uint32_t parity) {
  Wait(full, parity);
  FenceAsyncProxy();
}

// Codes of four keys, before they are converted: five times 16 bytes for each lane, and scales.
inline constexpr int kSlotBytes = 5 * 512 + 4 * 16;

}  // namespace fastattn::cuda::mla_sparse_sm90
