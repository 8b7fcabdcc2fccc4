#pragma once

#include "common/softcap.h"
#include "cuda/common/exp2.cuh"

namespace fastattn::cuda {

// Caps scores in units of log2 (see common/softcap.h).
class ScoreCap {
 public:
  __device__ __forceinline__ explicit ScoreCap(float softcap)
      : cap_(softcap * kLog2E), inverse_(Reciprocal(cap_)) {}

  // The largest caps are infinite here, and 1 / cap is 0, so that x comes back unchanged.
  __device__ __forceinline__ float operator()(float x) const {
    const float t = x * inverse_, u = t * t;
    float ratio = fmaf(kSoftcapSeries4, u, kSoftcapSeries3);
    ratio = fmaf(ratio, u, kSoftcapSeries2);
    ratio = fmaf(ratio, u, kSoftcapSeries1);
    ratio = fmaf(ratio, u, 1.0f);
    const float rest = Reciprocal(Exp2(t * (2.0f * kLog2E)) + 1.0f);
    return fabsf(t) < kSoftcapSmall ? x * ratio : fmaf(-2.0f * cap_, rest, cap_);
  }

 private:
  static constexpr float kLog2E = 1.44269504f;

  __device__ __forceinline__ static float Reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  float cap_, inverse_;
};

}  // namespace fastattn::cuda
