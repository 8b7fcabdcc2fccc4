// K's per-token scales, as a consumer's thread takes them.
#pragma once

#include <cstdint>

namespace fastattn::cuda::wgmma_q16 {

// The scales of the thread's columns: 16 of a KV tile at a time, loaded ahead of the scores.
struct KeyScales {
  static constexpr int kAhead = 2;

  float columns[kAhead][4];
  uint32_t address;

  __device__ __forceinline__ void Load(int j) {
    float (&x)[4] = columns[j % kAhead];
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(address + 16 * j));
  }
};

// Multiplies a thread's scores with them; `bias` is in the scores, and their first scales have been
// loaded.
template <class C>
__device__ __forceinline__ void ScaleScores(KeyScales& scales, float bias,
                                            float (&scores)[C::kScores]) {
#pragma unroll
  for (int j = 0; j < C::kKeys / 16; ++j) {
    const float (&scale)[4] = scales.columns[j % KeyScales::kAhead];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = scale[i / 4 * 2 + i % 2];
      float& s = scores[8 * j + i];
      s = bias != 0.0f ? fmaf(s, x, -bias * x) : s * x;
    }
    if (j + KeyScales::kAhead < C::kKeys / 16) scales.Load(j + KeyScales::kAhead);
  }
}

}  // namespace fastattn::cuda::wgmma_q16
