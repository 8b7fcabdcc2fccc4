// Dynamic scales of latent caches, with the same bits everywhere.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/numeric.h"
#include "common/types.h"

namespace fastattn {

// max(amax / 448, FLT_MIN) for the amax bits of a tile. An infinite amax counts as FLT_MAX; the
// scale of a NaN is one NaN everywhere, since a processor's own would reach the cache.
FASTATTN_HD float AmaxFp8Scale(uint32_t amax_bits) {
  constexpr uint32_t kFloorBits = 0x04E00000u;  // 448 * FLT_MIN
  if (amax_bits > 0x7F800000u) return BitsFloat(0x7FC00000u);
  if (amax_bits == 0x7F800000u) amax_bits = 0x7F7FFFFFu;
  if (amax_bits < kFloorBits) amax_bits = kFloorBits;
  return Div(BitsFloat(amax_bits), kE4M3Max);
}

// A channel that was computed, in bf16. Every NaN is 0x7FFF, as a GPU's conversion has it.
FASTATTN_HD uint16_t ComputedBFloat16(float value) {
  return IsNaN(value) ? uint16_t{0x7FFF} : FloatToBFloat16(value);
}

// A dequantised channel in bf16: one fp32 product, rounded.
FASTATTN_HD uint16_t MlaValue(float code, float scale) {
  return ComputedBFloat16(Mul(code, scale));
}

}  // namespace fastattn
