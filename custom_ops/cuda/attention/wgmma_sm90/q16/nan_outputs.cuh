// Makes outputs NaN whose rows see values or scales that are NaN or infinite (see nan_scrub.cuh).
#pragma once

#include "common/bounds.h"
#include "cuda/attention/wgmma_sm90/common/epilogue.cuh"
#include "cuda/attention/wgmma_sm90/common/tile_scheduler.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/common/lane.cuh"

namespace fastattn::cuda::wgmma_q16 {

// A bit for each of `count` tokens from `first` on that query h of the thread sees.
template <class C>
__device__ __forceinline__ uint32_t SeenTokens(const Shared<C>& shared, int buffer, int h,
                                               int first, int count) {
  const int2 visible = shared.visible[buffer][QueryIndex<true>(h)];
  const int begin = Clamp(visible.x - first, 0, count);
  const int end = Clamp(visible.y - first, 0, count);
  return static_cast<uint32_t>(((uint64_t{1} << end) - 1) & ~((uint64_t{1} << begin) - 1));
}

// Does so for 16 tokens of stage `at`, whose first key is `start`.
template <class C>
__device__ __forceinline__ void SetGroupNanOutputs(const Shared<C>& shared, uint32_t at, int buffer,
                                                   int start, int group, float (&o)[C::kOut]) {
  const uint32_t seen[2] = {SeenTokens(shared, buffer, 0, start + 16 * group, 16),
                            SeenTokens(shared, buffer, 1, start + 16 * group, 16)};
  const int first = 2 * (Lane<true>() % 4);
#pragma unroll
  for (int i = 0; i < C::kOut; ++i) {
    const int channel = first + 8 * (i / 4) + i % 2;
    if (shared.nan_tokens[at][channel][group] & seen[i / 2 % 2]) o[i] = NAN;
  }
}

// Sets the outputs of rows that see a value which is not finite (see NanScrubber); `found`: a byte
// for each helper warp that scrubs.
template <class C>
__device__ __forceinline__ void SetNanOutputs(const Shared<C>& shared, int found, uint32_t at,
                                              int buffer, int start, float (&o)[C::kOut]) {
  constexpr int kWarps = C::kQuantized ? C::kHelperWarps : C::kScrubWarps;
  static_assert(kWarps == 2 || kWarps == 3);
#pragma unroll 1
  for (int group = 0; group < C::kKeys / 16; ++group) {
    if (found & 1) SetGroupNanOutputs(shared, at, buffer, start, group, o);
    // The warps scrub one group each in turn: the first byte comes behind the last.
    found = __byte_perm(found, 0, kWarps == 3 ? 0x4021 : 0x4401);
  }
}

// Does the same for V's per-token scales (see PerTokenScaleLoader).
template <class C>
__device__ __forceinline__ void SetPoisonedOutputs(const Shared<C>& shared, uint32_t at, int buffer,
                                                   int start, float (&o)[C::kOut]) {
#pragma unroll 1
  for (int w = 0; w < C::kKeys / 32; ++w) {
    const uint32_t tokens = shared.poisoned[at][w];
    const bool hit[2] = {(tokens & SeenTokens(shared, buffer, 0, start + 32 * w, 32)) != 0,
                         (tokens & SeenTokens(shared, buffer, 1, start + 32 * w, 32)) != 0};
#pragma unroll
    for (int i = 0; i < C::kOut; ++i) {
      if (hit[i / 2 % 2]) o[i] = NAN;
    }
  }
}

}  // namespace fastattn::cuda::wgmma_q16
