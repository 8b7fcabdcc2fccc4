// Rows of latent caches as the CPU kernels read them.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dispatch.h"
#include "common/fp4.h"
#include "common/mla_scale.h"
#include "common/numeric.h"
#include "params/mla_cache.h"

namespace fastattn::cpu {

inline void DecodeMla(const uint8_t* codes, int n, float scale, uint16_t* out) {
  for (int i = 0; i < n; ++i) out[i] = MlaValue(E4M3ToFloat(codes[i]), scale);
}

// The token's channels, latent + 64 of them, in bf16.
template <MlaFormat kFormat>
void ReadMlaToken(MlaRow row, const float* cache_scale, uint16_t* out) {
  constexpr MlaFormatFacts kFacts = FactsOf(kFormat);
  constexpr size_t kRopeBytes = kMlaRopeDim * sizeof(uint16_t);
  if constexpr (kFormat == MlaFormat::kBf16) {
    std::memcpy(out, row.codes, kFacts.row_bytes);
  } else if constexpr (kFormat == MlaFormat::kFp8) {
    DecodeMla(row.codes, kFacts.row_bytes, *cache_scale, out);
  } else {
    for (int t = 0; t < kFacts.tiles; ++t) {
      float scale;
      if constexpr (kFormat == MlaFormat::kFp8x656) {
        std::memcpy(&scale, row.scales + t * sizeof(float), sizeof(float));
      } else {
        scale = UE8M0ToFloat(row.scales[t]);
      }
      DecodeMla(row.codes + t * kFacts.tile, kFacts.tile, scale, out + t * kFacts.tile);
    }
    if constexpr (kFormat == MlaFormat::kFp8x528) return;  // the rotated channels are codes, too
    std::memcpy(out + kFacts.latent, row.codes + kFacts.row_bytes - kRopeBytes, kRopeBytes);
  }
}

template <typename F>
void DispatchMlaFormat(MlaFormat format, F&& f) {
  dispatch<MlaFormat::kBf16, MlaFormat::kFp8, MlaFormat::kFp8x656, MlaFormat::kFp8x584,
           MlaFormat::kFp8x528>(format, "cache_format", f);
}

// Those that mla_write_cache writes.
template <typename F>
void DispatchMlaWritten(MlaFormat format, F&& f) {
  dispatch<MlaFormat::kBf16, MlaFormat::kFp8, MlaFormat::kFp8x656, MlaFormat::kFp8x584>(
      format, "cache_format", f);
}

}  // namespace fastattn::cpu
