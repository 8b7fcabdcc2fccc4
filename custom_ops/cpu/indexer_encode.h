// Codes and power-of-two scales of blocks of channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/exact.h"
#include "common/fp4.h"
#include "common/numeric.h"

namespace fastattn::cpu {

inline uint32_t AmaxBits(const float* x, int n) {
  uint32_t amax = 0;
  for (int i = 0; i < n; ++i) amax = std::max(amax, AbsBits(x[i]));
  return amax;
}

// Writes n e4m3 codes and returns their power-of-two scale.
inline float EncodeFp8(const float* x, int n, uint8_t* codes,
                       uint32_t floor_bits = kCacheFloorBits) {
  const float scale = PowerOfTwoFp8Scale(AmaxBits(x, n), floor_bits);
  const float inverse = 1.0f / scale;  // exact
  for (int i = 0; i < n; ++i) codes[i] = FloatToE4M3(x[i] * inverse);
  return scale;
}

// Writes n / 2 bytes of E2M1 pairs and n / 32 UE8M0 bytes.
inline void EncodeMxfp4(const float* x, int n, uint8_t* codes, uint8_t* scales) {
  for (int b = 0; b < n / kMxBlock; ++b) {
    const float* block = x + b * kMxBlock;
    uint32_t amax = 0;
    for (int i = 0; i < kMxBlock; ++i) amax = std::max(amax, MxAbsBits(block[i]));
    scales[b] = MxScaleByte(amax);
    const float inverse = UE8M0Inverse(scales[b]);
    for (int i = 0; i < kMxBlock; i += 2) {
      codes[(b * kMxBlock + i) / 2] =
          PackE2M1(FloatToE2M1(block[i] * inverse), FloatToE2M1(block[i + 1] * inverse));
    }
  }
}

}  // namespace fastattn::cpu
