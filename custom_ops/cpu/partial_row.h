// Joins results of an attention row over some of its keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastattn::cpu {

// Adds keys to the keys before them. A state is the maximum, a base-2 logarithm, and the sum of
// exp2(score - maximum); outputs are not normalised. Keys of which none is visible have sum 0 and
// output 0 and change no bit. A NaN stands in both, and a weight of 0 leaves it NaN.
inline void AddPartialRow(const float* added, const float* out, int dim, float* state, float* acc) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float largest = std::max(state[0], added[0]);
  const float shift = largest == -kInf ? 0.0f : largest;
  const float keep = std::exp2(state[0] - shift), weight = std::exp2(added[0] - shift);
  state[0] = largest;
  state[1] = state[1] * keep + added[1] * weight;
  for (int d = 0; d < dim; ++d) acc[d] = acc[d] * keep + out[d] * weight;
}

}  // namespace fastattn::cpu
