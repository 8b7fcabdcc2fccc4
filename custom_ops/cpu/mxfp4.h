#pragma once

#include <cstdint>

#include "common/fp4.h"
#include "cpu/convert.h"
#include "params/mxfp4.h"

namespace fastattn::cpu {

void Mxfp4Quantize(const Mxfp4QuantizeParams& p);
void Mxfp4Dequantize(const Mxfp4DequantizeParams& p);

// E2M1 pairs [n / 2] and exponent bytes [n / 32] of n fp32 values; n is a multiple of 32.
inline void EncodeMxfp4(const float* x, int64_t n, uint8_t* codes, uint8_t* scales) {
  for (int64_t block = 0; block < n / kMxBlock; ++block) {
    const float* in = x + block * kMxBlock;
    scales[block] = MxScaleByte(GroupAmaxBits<kMxBlock>(in));
    const float inverse = UE8M0Inverse(scales[block]);
    uint8_t one_a_byte[kMxBlock];
    for (int i = 0; i < kMxBlock; ++i) {
      one_a_byte[i] = static_cast<uint8_t>(FloatToE2M1(in[i] * inverse));
    }
    uint8_t* out = codes + block * (kMxBlock / 2);
    for (int i = 0; i < kMxBlock / 2; ++i) {
      out[i] = PackE2M1(one_a_byte[2 * i], one_a_byte[2 * i + 1]);
    }
  }
}

}  // namespace fastattn::cpu
