// The conversions of custom_ops/common as plain functions over arrays, and the proof of E2M1 over
// every fp32 value. Compiled by tests/tooling/test_numerics.py; no Paddle.
#include <cmath>
#include <cstdint>

#include "common/exact.h"
#include "common/fp4.h"
#include "common/numeric.h"

using namespace fastattn;

namespace {

template <typename In, typename Out, typename F>
void Map(const void* in, void* out, int64_t n, F f) {
  for (int64_t i = 0; i < n; ++i) static_cast<Out*>(out)[i] = f(static_cast<const In*>(in)[i]);
}

// Nearest of the 8 magnitudes; of two at the same distance the even code. The distances are exact
// wherever they decide: near a midpoint both operands have the same exponent or nearly so.
uint32_t NearestE2M1(float x) {
  constexpr double kValues[8] = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
  if (std::isnan(x)) return 7;
  // What lies beyond 8 is nearest to 6 as 8 is, and fp64 could not tell its distances apart.
  const double magnitude = std::fmin(std::fabs(static_cast<double>(x)), 8.0);
  uint32_t best = 0;
  for (uint32_t i = 1; i < 8; ++i) {
    const double here = std::fabs(magnitude - kValues[i]);
    const double there = std::fabs(magnitude - kValues[best]);
    if (here < there || (here == there && i % 2 == 0)) best = i;
  }
  return best | (std::signbit(x) ? 8u : 0u);
}

}  // namespace

extern "C" {

void to_bf16(const void* x, void* y, int64_t n) { Map<float, uint16_t>(x, y, n, FloatToBFloat16); }
void from_bf16(const void* x, void* y, int64_t n) {
  Map<uint16_t, float>(x, y, n, BFloat16ToFloat);
}
void to_f16(const void* x, void* y, int64_t n) { Map<float, uint16_t>(x, y, n, FloatToFloat16); }
void from_f16(const void* x, void* y, int64_t n) { Map<uint16_t, float>(x, y, n, Float16ToFloat); }
void to_e4m3(const void* x, void* y, int64_t n) { Map<float, uint8_t>(x, y, n, FloatToE4M3); }
void from_e4m3(const void* x, void* y, int64_t n) { Map<uint8_t, float>(x, y, n, E4M3ToFloat); }
void to_e5m2(const void* x, void* y, int64_t n) { Map<float, uint8_t>(x, y, n, FloatToE5M2); }
void from_e5m2(const void* x, void* y, int64_t n) { Map<uint8_t, float>(x, y, n, E5M2ToFloat); }
void to_int8(const void* x, void* y, int64_t n) { Map<float, int8_t>(x, y, n, FloatToInt8); }
void to_e2m1(const void* x, void* y, int64_t n) { Map<float, uint8_t>(x, y, n, FloatToE2M1); }
void from_e2m1(const void* x, void* y, int64_t n) { Map<uint8_t, float>(x, y, n, E2M1ToFloat); }
void from_ue8m0(const void* x, void* y, int64_t n) { Map<uint8_t, float>(x, y, n, UE8M0ToFloat); }
void inverse_ue8m0(const void* x, void* y, int64_t n) {
  Map<uint8_t, float>(x, y, n, UE8M0Inverse);
}
void mx_scale_byte(const void* x, void* y, int64_t n) {
  Map<float, uint8_t>(x, y, n, [](float amax) { return MxScaleByte(AbsBits(amax)); });
}
void exp_non_positive(const void* x, void* y, int64_t n) {
  Map<float, float>(x, y, n, ExpNonPositive);
}

// DynamicScale of n amax values.
void dynamic_scale(const void* x, void* y, int64_t n, float floor, float qmax) {
  Map<float, float>(x, y, n, [=](float a) { return DynamicScale(AbsBits(a), floor, qmax); });
}

// Number of the 2^32 fp32 values whose E2M1 code is not the nearest one.
int64_t e2m1_mismatches(int64_t first, int64_t last) {
  int64_t wrong = 0;
  for (int64_t bits = first; bits < last; ++bits) {
    const float x = BitsFloat(static_cast<uint32_t>(bits));
    wrong += FloatToE2M1(x) != NearestE2M1(x);
  }
  return wrong;
}
}
