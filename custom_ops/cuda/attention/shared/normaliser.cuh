// From a row's maximum and sum of probabilities to its LSE and the factor of its output.
#pragma once

namespace fastattn::cuda {

inline constexpr float kLn2 = 0.693147181f;
inline constexpr float kLog2E = 1.44269504f;

struct Normaliser {
  float lse;     // natural logarithm
  float factor;  // what the sum of P * V is multiplied with
};

// Joins a sink, which enters the denominator and has no value. `maximum` is in units of log2; `sum`
// counts 2^kLog2Unit of the true sum relative to it.
template <int kLog2Unit>
__device__ __forceinline__ Normaliser JoinSink(float maximum, float sum, float sink) {
  const float largest = fmaxf(maximum, sink * kLog2E);
  const float weight = exp2f(maximum - largest);
  Normaliser result;
  if constexpr (kLog2Unit == 0) {
    const float total = sum * weight + exp2f(sink * kLog2E - largest);
    result = {(largest + log2f(total)) * kLn2, weight / total};
  } else {
    constexpr float kUnit = kLog2Unit;
    const float total = sum * weight + exp2f(sink * kLog2E - largest + kUnit);
    result = {(largest + log2f(total) - kUnit) * kLn2, weight / total};
  }
  return result;
}

}  // namespace fastattn::cuda
