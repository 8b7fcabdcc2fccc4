// Keys that causal mask and window leave visible to a query.
#pragma once

#include "cuda/attention/shared/seq_lengths.cuh"
#include "params/attention.h"

namespace fastattn::cuda {

// The end of the keys that a query at `position` of its sequence sees, of those before `end`;
// mask_offsets apart. It may lie before their begin.
template <class Bounds>
__device__ __forceinline__ int VisibleEnd(const AttentionParams& p, int position, int end) {
  if (p.causal) end = min(end, position + 1);
  if (p.window_right >= 0) end = min(end, Bounds::WindowEnd(position, p.window_right));
  return end;
}

// The first key that it sees, of those from `begin` on.
template <class Bounds>
__device__ __forceinline__ int VisibleBegin(const AttentionParams& p, int position, int begin) {
  if (p.window_left >= 0) begin = max(begin, position - min(p.window_left, Bounds::kMaxKeys));
  return begin;
}

}  // namespace fastattn::cuda
