// Logits of MXFP4 rows whose blocks are too far apart for one row of e4m3, one by one, in fp64.
#pragma once

#include "common/fp4.h"
#include "cuda/mqa_logits/config.h"

namespace fastattn::cuda::mqa_logits {

__device__ __forceinline__ double PowerOfTwo(int e) {
  return __hiloint2double((e + 1023) << 20, 0);
}

// Twice the value of a code.
__device__ __forceinline__ int TwiceE2M1(uint32_t code) {
  const int magnitude = 0xC8643210u >> 4 * (code & 7) & 0xF;
  return code & 8 ? -magnitude : magnitude;
}

// Product of a query head and a key.
__device__ inline double WideProduct(const uint8_t* q, const uint8_t* q_scales, const uint8_t* k,
                                     const uint8_t* k_scales) {
  double sum = 0.0;
#pragma unroll 1
  for (int block = 0; block < kDim / kMxBlock; ++block) {
    int part = 0;
#pragma unroll 1
    for (int i = 0; i < kMxBlock / 2; ++i) {
      const uint32_t x = q[block * (kMxBlock / 2) + i], y = k[block * (kMxBlock / 2) + i];
      part += TwiceE2M1(x & 0xF) * TwiceE2M1(y & 0xF) + TwiceE2M1(x >> 4) * TwiceE2M1(y >> 4);
    }
    sum += part * PowerOfTwo(q_scales[block] + k_scales[block] - 2 * 127 - 2);
  }
  return sum;
}

// The logit of row `row` and a key, by a warp: a lane takes every 32nd head.
template <int kHeads>
__device__ inline float WideLogit(const LogitsParams& p, int64_t row, const uint8_t* key,
                                  const uint8_t* key_scales, int lane) {
  double sum = 0.0;
#pragma unroll 1
  for (int h = lane; h < kHeads; h += 32) {
    const int64_t head = row * kHeads + h;
    const uint8_t* scales = p.q_scales + head * kLogitsScaleBytes;
    double x = WideProduct(p.q + head * (kDim / 2), scales, key, key_scales);
    bool nan = false;
#pragma unroll 1
    for (int b = 0; b < kDim / kMxBlock; ++b) {
      nan |= scales[b] == kUE8M0NaN || key_scales[b] == kUE8M0NaN;
    }
    if (nan) x = __longlong_as_double(0x7FF8000000000000ll);
    sum += (x < 0.0 ? 0.0 : x) * p.weights[head];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return static_cast<float>(sum);
}

}  // namespace fastattn::cuda::mqa_logits
