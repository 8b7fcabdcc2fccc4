#pragma once

#include <algorithm>
#include <cstdint>

#include "common/fp4.h"
#include "params/mxfp4.h"

namespace fastattn::cpu {

void Mxfp4Quantize(const Mxfp4QuantizeParams& p);
void Mxfp4Dequantize(const Mxfp4DequantizeParams& p);

// E2M1 pairs [n / 2] and exponent bytes [n / 32] of n fp32 values; n is a multiple of 32.
inline void EncodeMxfp4(const float* x, int64_t n, uint8_t* codes, uint8_t* scales) {
  for (int64_t block = 0; block < n / kMxBlock; ++block) {
    const float* in = x + block * kMxBlock;
    uint32_t amax = 0;
    for (int i = 0; i < kMxBlock; ++i) amax = std::max(amax, MxAbsBits(in[i]));
    scales[block] = MxScaleByte(amax);
    const float inverse = UE8M0Inverse(scales[block]);
    uint8_t* out = codes + block * (kMxBlock / 2);
    for (int i = 0; i < kMxBlock; i += 2) {
      out[i / 2] = PackE2M1(FloatToE2M1(in[i] * inverse), FloatToE2M1(in[i + 1] * inverse));
    }
  }
}

}  // namespace fastattn::cpu
