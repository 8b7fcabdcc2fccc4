// K's per-token scales, as a consumer's thread takes them.
#pragma once

#include <cstdint>

namespace fastattn::cuda::wgmma_fp16 {

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

}  // namespace fastattn::cuda::wgmma_fp16
