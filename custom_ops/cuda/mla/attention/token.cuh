// Tokens of latent caches as bf16, 8 channels at a time.
#pragma once

#include <cstdint>

#include "common/block_table.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "common/types.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "params/mla_attention.h"

namespace fastattn::cuda::mla_attention {

template <MlaFormat kFormat>
inline constexpr int kDim = FactsOf(kFormat).latent + kMlaRopeDim;

using Token = MlaRow;  // without codes where no page is assigned

// Position `key` of a sequence; it is not negative.
template <MlaFormat kFormat>
__device__ __forceinline__ Token FindToken(const MlaAttentionParams& p, const Divisor& page_size,
                                           int batch_idx, int key) {
  const uint32_t index = page_size.Quotient(static_cast<uint32_t>(key));
  const int page = BlockOf(p.seqs.block_tables, p.seqs.max_blocks,
                           static_cast<int>(p.cache.num_pages), batch_idx, index);
  if (page < 0) return {nullptr, nullptr};
  const uint32_t row = static_cast<uint32_t>(key) - index * page_size.divisor;
  return MlaRowOf(p.cache, kFormat, page, row);
}

// Eight codes, each times the scale in one fp32 product, rounded.
__device__ __forceinline__ uint4 Dequantise(uint32_t low, uint32_t high, float scale) {
  float a[4], b[4];
  CodesToFloat<DType::kE4M3>(low, a);
  CodesToFloat<DType::kE4M3>(high, b);
  constexpr DType kOut = DType::kBFloat16;
  return make_uint4(PackPair<kOut>(Mul(a[0], scale), Mul(a[1], scale)),
                    PackPair<kOut>(Mul(a[2], scale), Mul(a[3], scale)),
                    PackPair<kOut>(Mul(b[0], scale), Mul(b[1], scale)),
                    PackPair<kOut>(Mul(b[2], scale), Mul(b[3], scale)));
}

// Channels 8 * chunk on. `static_scale` is kFp8's.
template <MlaFormat kFormat>
__device__ __forceinline__ uint4 LoadChunk(const Token& token, int chunk, float static_scale) {
  constexpr MlaFormatFacts kFacts = FactsOf(kFormat);
  if (token.codes == nullptr) return make_uint4(0, 0, 0, 0);
  if constexpr (kFormat == MlaFormat::kBf16) {
    return __ldg(reinterpret_cast<const uint4*>(token.codes) + chunk);
  } else {
    constexpr int kCoded = kFacts.tiles * kFacts.tile / 8;
    if (kFacts.tile > 0 && chunk >= kCoded) {
      const uint8_t* rope = token.codes + kFacts.row_bytes - kMlaRopeDim * 2;
      return __ldg(reinterpret_cast<const uint4*>(rope) + chunk - kCoded);
    }
    const uint2 codes = __ldg(reinterpret_cast<const uint2*>(token.codes) + chunk);
    float scale = static_scale;
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      scale = __ldg(reinterpret_cast<const float*>(token.scales) + chunk / (kFacts.tile / 8));
    } else if constexpr (ScalePlaneBytes(kFormat) > 0) {
      scale = UE8M0ToFloat(__ldg(token.scales + chunk / (kFacts.tile / 8)));
    }
    return Dequantise(codes.x, codes.y, scale);
  }
}

// Clears infinities and NaN among eight bf16 channels: as values that some query must not see, they
// would spoil a product with its weight 0.
__device__ __forceinline__ uint4 FiniteChannels(uint4 x) {
  const auto finite = [](uint32_t pair) {
    if ((pair & 0x7F80u) == 0x7F80u) pair &= 0xFFFF0000u;
    if ((pair & 0x7F800000u) == 0x7F800000u) pair &= 0xFFFFu;
    return pair;
  };
  return make_uint4(finite(x.x), finite(x.y), finite(x.z), finite(x.w));
}

}  // namespace fastattn::cuda::mla_attention
