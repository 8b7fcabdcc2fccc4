// V's per-token scales (block_wise_fp8, block_wise_int8), which multiply the probabilities.
#pragma once

#include <cstdint>

#include "cuda/attention/mma_sm80/kv_tile.cuh"
#include "cuda/attention/mma_sm80/query.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/shared_address.cuh"

namespace fastattn::cuda {

// Address of the exponents of this lane's packed rows, 8 bytes apart: in shared memory that takes
// the packed rows' maxima and sums when the segment ends.
template <typename Traits>
__device__ __forceinline__ uint32_t RowExponents() {
  extern __shared__ __align__(128) char shared[];
  const int thread = Thread<true>(), warp = thread / 32, pipeline = warp / Traits::kPipelineWarps;
  const int packed_row = warp % Traits::kPipelineWarps * Traits::kTiles * 8 + 2 * (thread % 4);
  return SharedAddress(shared) + Traits::kStateOffset +
         (pipeline * Traits::kTileRows + packed_row) * 8;
}

__device__ __forceinline__ int LoadExponent(uint32_t address) {
  int exponent;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(exponent) : "r"(address) : "memory");
  return exponent;
}

// Per-token scales are bounded by 2^(exponent - 127), with `largest` the bits of the largest one.
__device__ __forceinline__ int ExponentAbove(uint32_t largest) {
  return min(static_cast<int>(largest >> 23) + 1, 252);
}

// Raises the exponents of packed rows that differ in what they see, each to what bounds the scales
// that the packed row itself sees: a scale that only another packed row sees must not take its
// bits. The exponents then lie in shared memory, each followed by the one before; `uniform`: the
// one of all packed rows, if they had none of their own. A call, as registers are short and few KV
// tiles need it.
template <typename Traits>
__device__ __noinline__ void RaiseRowExponents(uint32_t stage, DType dtype, uint32_t row_infos,
                                               int first_key, int first, int uniform) {
  const int g = threadIdx.x % 32 / 4;
  const uint32_t exponents = RowExponents<Traits>();
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < 2 * Traits::kTiles; ++i) {
    const int packed_row = 8 * (i / 2) + i % 2;
    const uint2 range = LoadShared8(row_infos + packed_row * sizeof(PackedRowInfo));
    const int begin = static_cast<int>(range.x) - first_key;
    const int end = static_cast<int>(range.y) - first_key;
    uint32_t largest = 0;
#pragma unroll 1
    for (int j = 0; j < 2 * Traits::kGroup; ++j) {
      const int key = Traits::KeyOf(first + j / 2, g + 8 * (j % 2));
      const uint32_t bits = __float_as_uint(TokenScale<Traits>(stage, key, dtype)) & 0x7FFFFFFFu;
      if constexpr (Traits::kGeneral) {
        const RowKeys<Traits> seen(row_infos + packed_row * sizeof(PackedRowInfo));
        if (!seen.Sees(first_key + key)) continue;
      }
      if (key >= begin && key < end && bits < 0x7F800000u) largest = max(largest, bits);
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
    }
    const uint32_t address = exponents + packed_row * 8;
    const int before = uniform == kRowExponents ? LoadExponent(address) : uniform;
    __syncwarp();
    if (g == 0) {
      asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(address),
                   "r"(max(before, ExponentAbove(largest))), "r"(before)
                   : "memory");
    }
  }
  __syncwarp();
}

// Multiplies probabilities with V's scales where packed rows differ in what they see.
template <typename Traits>
__device__ __forceinline__ void ApplyRowScales(const AttentionParams& p, uint32_t stage,
                                               const KvTileMask& mask, int first,
                                               float (&scores)[Traits::kGroup][Traits::kTiles][4],
                                               TileState<Traits>* state) {
  RaiseRowExponents<Traits>(stage, TokenScaleType<Traits>(p), mask.row_infos, mask.first_key, first,
                            state->scale_exponent);
  state->scale_exponent = kRowExponents;
  const int g = Lane<true>() / 4;  // found again, as registers are short
  const uint32_t exponents = RowExponents<Traits>();
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint2 pair = LoadShared8(exponents + (8 * n + c) * 8);
      const int exponent = static_cast<int>(pair.x), before = static_cast<int>(pair.y);
      const float raise = Exp2(static_cast<float>(before - exponent));
#pragma unroll
      for (int i = 0; i < Traits::kOutTiles; ++i) {
        state->out[i][n][c] *= raise;
        state->out[i][n][c + 2] *= raise;
      }
      const float inverse = __uint_as_float(static_cast<uint32_t>(254 - exponent) << 23);
#pragma unroll
      for (int i = 0; i < 2 * Traits::kGroup; ++i) {
        const int key = Traits::KeyOf(first + i / 2, g + 8 * (i % 2));
        scores[i / 2][n][2 * (i % 2) + c] *=
            TokenScale<Traits>(stage, key, TokenScaleType<Traits>(p)) * inverse;
      }
    }
  }
}

// Brings outputs whose packed rows have exponents of their own to units of 1. The exponents' memory
// is free then.
template <typename Traits>
__device__ __forceinline__ void DropRowExponents(TileState<Traits>* state) {
  const uint32_t exponents = RowExponents<Traits>();
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const uint32_t exponent = LoadExponent(exponents + (8 * n + c) * 8);
      const float factor = __uint_as_float(exponent << 23);
#pragma unroll
      for (int i = 0; i < Traits::kDimTiles; ++i) {
        state->out[i][n][c] *= factor;
        state->out[i][n][c + 2] *= factor;
      }
    }
  }
  state->scale_exponent = 127;
  __syncwarp();
}

// Does the same where packed rows do not differ, relative to a power of two that bounds all scales.
// `scale`: V's scales of the lane's keys.
template <typename Traits>
__device__ __forceinline__ void ApplyCommonScales(
    const AttentionParams& p, uint32_t stage, const KvTileMask& mask, int first,
    float (&scale)[Traits::kGroup][2], float (&scores)[Traits::kGroup][Traits::kTiles][4],
    TileState<Traits>* state) {
  const int g = threadIdx.x % 32 / 4;
  uint32_t largest = 0;
#pragma unroll
  for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = Traits::KeyOf(first + m, g + 8 * half);
      float x;
      if constexpr (Traits::kScalesAtOnce) {
        x = scale[m][half];
      } else {
        x = TokenScale<Traits>(stage, key, TokenScaleType<Traits>(p));
      }
      if (mask.needs_mask && (key < mask.begin || key >= mask.end)) x = 0.0f;
      scale[m][half] = x;
      const uint32_t bits = __float_as_uint(x) & 0x7FFFFFFFu;
      if (bits < 0x7F800000u) largest = max(largest, bits);
    }
  }
  largest = __reduce_max_sync(0xFFFFFFFFu, largest);
  const int exponent = ExponentAbove(largest);
  if (exponent > state->scale_exponent) {
    const float factor = Exp2(static_cast<float>(state->scale_exponent - exponent));
#pragma unroll
    for (int i = 0; i < Traits::kOutTiles; ++i) {
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) state->out[i][n][c] *= factor;
      }
    }
    state->scale_exponent = exponent;
  }
  const float inverse = __uint_as_float(static_cast<uint32_t>(254 - state->scale_exponent) << 23);
#pragma unroll
  for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = scale[m][half] * inverse;
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) scores[m][n][2 * half + c] *= factor;
      }
    }
  }
}

// Multiplies probabilities with V's per-token scales.
template <typename Traits>
__device__ __forceinline__ void ApplyValueScales(const AttentionParams& p, uint32_t stage,
                                                 const KvTileMask& mask, int first,
                                                 float (&scale)[Traits::kGroup][2],
                                                 float (&scores)[Traits::kGroup][Traits::kTiles][4],
                                                 TileState<Traits>* state) {
  if ((mask.needs_mask && mask.packed_rows_differ) || state->scale_exponent == kRowExponents) {
    ApplyRowScales<Traits>(p, stage, mask, first, scores, state);
  } else {
    ApplyCommonScales<Traits>(p, stage, mask, first, scale, scores, state);
  }
  // A NaN scale of a key that a packed row does not see must not reach that packed row.
  if (mask.needs_mask) MaskKeys<Traits>(mask, first, 0.0f, scores);
}

}  // namespace fastattn::cuda
