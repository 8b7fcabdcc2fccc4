// How a softcap, cap * tanh(x / cap), keeps its precision whatever the cap is.
//
// With t = x / cap, 1 - 2 / (exp(2 t) + 1) is tanh(t) with an absolute error. Times the cap, that
// error is as large as scores that are far below the cap. For those the result is x * (tanh(t) /
// t), and the ratio is a polynomial in t^2, so that an error of t hardly counts.
#pragma once

namespace fastattn {

// The polynomial is used for |t| below this.
inline constexpr float kSoftcapSmall = 0.5f;

// tanh(t) / t = 1 + u * (k1 + u * (k2 + u * (k3 + u * k4))), u = t^2: the minimax polynomial, of
// relative error 1.5e-8.
inline constexpr float kSoftcapSeries1 = -0x1.5554d6p-2f;
inline constexpr float kSoftcapSeries2 = 0x1.10e9fcp-3f;
inline constexpr float kSoftcapSeries3 = -0x1.b28c76p-5f;
inline constexpr float kSoftcapSeries4 = 0x1.1a7c0ep-6f;

}  // namespace fastattn
