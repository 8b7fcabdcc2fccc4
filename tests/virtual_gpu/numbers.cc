// 16-bit and 8-bit floating point.
#include <immintrin.h>

#include <array>
#include <cmath>

#include "machine.h"

namespace virtual_gpu {

namespace {

constexpr uint32_t kSign = 0x80000000u;

// An 8-bit number with `kMantissa` bits behind its point and the exponent bias `kBias`; `greatest`
// is the code of the greatest finite one, which stands for all that is beyond, infinity too.
template <int kMantissa, int kBias>
uint8_t Narrow(float value, uint32_t greatest) {
  constexpr int kDropped = 23 - kMantissa;
  const uint32_t bits = AsBits(value);
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > 0x7F800000u) return 0x7F;
  uint32_t code = 0;
  if (magnitude < uint32_t{127 - kBias + 1} << 23) {
    // Below the least normal number, codes count multiples of the least one.
    const float steps = std::ldexp(AsFloat(magnitude), kBias - 1 + kMantissa);
    code = static_cast<uint32_t>(std::nearbyint(steps));
  } else {
    const uint32_t odd = magnitude >> kDropped & 1;
    const uint32_t rounded = (magnitude + (1u << (kDropped - 1)) - 1 + odd) >> kDropped;
    code = rounded - (uint32_t{127 - kBias} << kMantissa);
  }
  if (code > greatest) code = greatest;
  return static_cast<uint8_t>(code | (bits >> 24 & 0x80));
}

float E4m3(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if ((code & 0x7F) == 0x7F) value = AsFloat(0x7FFFFFFFu);
  return (code & 0x80) != 0 ? -value : value;
}

}  // namespace

float HalfToFloat(uint16_t bits) { return _cvtsh_ss(bits); }

uint16_t FloatToHalf(float value) {
  if (std::isnan(value)) return 0x7FFF;
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}

float Bf16ToFloat(uint16_t bits) { return AsFloat(uint32_t{bits} << 16); }

uint16_t FloatToBf16(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t bits = AsBits(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

float E4m3ToFloat(uint8_t bits) {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> table{};
    for (int code = 0; code < 256; ++code) table[code] = E4m3(code);
    return table;
  }();
  return values[bits];
}

// The first byte of a half.
float E5m2ToFloat(uint8_t bits) { return HalfToFloat(static_cast<uint16_t>(bits << 8)); }

uint8_t FloatToE4m3(float value) { return Narrow<3, 7>(value, 0x7E); }
uint8_t FloatToE5m2(float value) { return Narrow<2, 15>(value, 0x7B); }

}  // namespace virtual_gpu
