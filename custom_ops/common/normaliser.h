// From a row's maximum and sum of probabilities to its LSE and the factor of its output.
#pragma once

#include <cmath>

#include "common/types.h"

namespace fastattn {

inline constexpr float kLn2 = 0.693147181f;
inline constexpr float kLog2E = 1.44269504f;

struct Normaliser {
  float lse;     // natural logarithm
  float factor;  // what the sum of P * V is multiplied with
};

// Adds a sink, which enters the denominator and has no value. `maximum` is in units of log2; `sum`
// counts 2^kLog2Unit of the true sum relative to it. The sink is not infinity.
template <int kLog2Unit>
FASTATTN_HD Normaliser AddSink(float maximum, float sum, float sink) {
  constexpr float kUnit = kLog2Unit;
  const float largest = fmaxf(maximum, sink * kLog2E);
  const float weight = exp2f(maximum - largest);
  // Subtractions of kUnit, so that nothing is left of them where it is 0.
  const float total = sum * weight + exp2f(sink * kLog2E - largest - (0.0f - kUnit));
  return {(largest + log2f(total) - kUnit) * kLn2, weight / total};
}

// Of a row; `empty`: it sees no key, and then neither the sink nor anything else gives it an LSE or
// an output. `load_sink()` is asked only where there is a sink, or -inf for none, and it matters.
// Takes `sinks` where it lies: kernels read it when they need it.
template <int kLog2Unit, class LoadSink>
FASTATTN_HD Normaliser NormaliserOf(bool empty, float maximum, float sum, const void* const& sinks,
                                    LoadSink&& load_sink) {
  constexpr float kInf = __builtin_huge_valf(), kUnit = kLog2Unit;
  float lse = empty ? -kInf : (maximum + log2f(sum) - kUnit) * kLn2;
  float factor = empty ? 0.0f : 1.0f / sum;
  if (sinks != nullptr && !empty) {
    const float sink = load_sink();
    if (sink == kInf) {
      lse = kInf;
      factor = 0.0f;
    } else {
      const Normaliser with_sink = AddSink<kLog2Unit>(maximum, sum, sink);
      lse = with_sink.lse;
      factor = with_sink.factor;
    }
  }
  return {lse, factor};
}

// The same for kernels that have loaded the sink, or -inf for none, which adds nothing.
FASTATTN_HD Normaliser NormaliserOf(bool empty, float maximum, float sum, float sink) {
  constexpr float kInf = __builtin_huge_valf();
  float lse = -kInf, factor = 0.0f;
  if (sink == kInf) {
    lse = empty ? lse : kInf;
  } else if (!empty) {
    const Normaliser with_sink = AddSink<0>(maximum, sum, sink);
    lse = with_sink.lse;
    factor = with_sink.factor;
  }
  return {lse, factor};
}

// Of a row of latent attention, whose LSE is without the sink. `maximum` is in units of log2, `sum`
// relative to it. No score above -inf gives a sum of 0, the same as no key.
template <class LoadSink>
FASTATTN_HD Normaliser NormaliserWithoutSink(float maximum, float sum, const float* const& sinks,
                                             LoadSink&& load_sink) {
  if (sum == 0.0f) return {-__builtin_huge_valf(), 0.0f};
  const float lse = maximum + log2f(sum);
  float factor = 1.0f / sum;
  if (sinks != nullptr) factor /= 1.0f + exp2f(load_sink() * kLog2E - lse);
  return {lse * kLn2, factor};
}

// The largest score of such a row, natural. Comparisons pass over a NaN, which the sum keeps.
FASTATTN_HD float LargestLogit(float maximum, float sum) {
  return sum == sum ? maximum * kLn2 : __builtin_nanf("");
}

}  // namespace fastattn
