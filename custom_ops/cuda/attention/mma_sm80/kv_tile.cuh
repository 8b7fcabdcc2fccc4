// One KV tile: scores, softmax and output of a warp's packed rows.
#pragma once

#include <cstdint>

#include "common/exact.h"
#include "common/layout.h"
#include "common/numeric.h"
#include "cuda/attention/mma_sm80/nibbles.cuh"
#include "cuda/attention/mma_sm80/query.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/softcap.cuh"

namespace fastattn::cuda {

// Not an exponent: packed rows have exponents of their own.
inline constexpr int kRowExponents = 0;

// Running maximum (log2 units), sum and output of a warp's packed rows over its pipeline's keys.
template <typename Traits>
struct TileState {
  float maximum[Traits::kTiles][2];
  float sum[Traits::kTiles][2];  // of this lane's keys only
  float out[Traits::kOutTiles][Traits::kTiles][4];
  // Per-token scales of V: `out` counts 2^(scale_exponent - 127); kRowExponents: a power of two
  // of each packed row's own (see value_scales.cuh).
  int scale_exponent;

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        maximum[n][c] = -kInfinity;
        sum[n][c] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < Traits::kOutTiles; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[i][n][c] = 0.0f;
      }
    }
    scale_exponent = 1;
  }
};

// What a KV tile's keys are to the packed rows of the work tile.
struct KvTileMask {
  int first_key;            // of the KV tile, in the sequence
  bool needs_mask;          // some packed row does not see some key
  bool packed_rows_differ;  // in what they see
  int begin, end;      // keys of the KV tile that any packed row may see, relative to first_key
  uint32_t row_infos;  // shared memory: PackedRowInfo of this lane's first packed row
};

// How a stage holds the scales of tokens.
template <typename Traits>
__device__ __forceinline__ DType TokenScaleType(const AttentionParams& p) {
  return Traits::kBlockScales ? DType::kBFloat16 : p.cache.scale_dtype;
}

template <typename Traits>
__device__ __forceinline__ float TokenScale(uint32_t stage, int key, DType dtype) {
  if (dtype == DType::kFloat32) {
    float scale;
    asm volatile("ld.shared.f32 %0, [%1];"
                 : "=f"(scale)
                 : "r"(stage + Traits::kDataBytes + key * 4));
    return scale;
  }
  uint16_t bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(stage + Traits::kDataBytes + key * 2));
  return BFloat16ToFloat(bits);
}

// Per-token scales of the keys of a lane's scores. The scales' dtype is looked at once.
template <typename Traits>
__device__ __forceinline__ void LoadTokenScales(uint32_t stage, int first, DType dtype,
                                                float (&scale)[Traits::kGroup][2]) {
  const int key = Traits::KeyOf(first, threadIdx.x % 32 / 4);
  const uint32_t scales = stage + Traits::kDataBytes;
  if constexpr (Traits::kValueNibbles) {  // the keys lie side by side
    constexpr int kCount = 2 * Traits::kGroup;
    static_assert(Traits::KeyOf(1, 0) == 2 && Traits::KeyOf(0, 8) == 1);
    if (dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        const uint4 four = LoadShared16(scales + key * 4 + i * 16);
        scale[2 * i][0] = __uint_as_float(four.x), scale[2 * i][1] = __uint_as_float(four.y);
        scale[2 * i + 1][0] = __uint_as_float(four.z);
        scale[2 * i + 1][1] = __uint_as_float(four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
        const uint2 four = LoadShared8(scales + key * 2 + i * 8);
        scale[2 * i][0] = __uint_as_float(four.x << 16);
        scale[2 * i][1] = __uint_as_float(four.x & 0xFFFF0000u);
        scale[2 * i + 1][0] = __uint_as_float(four.y << 16);
        scale[2 * i + 1][1] = __uint_as_float(four.y & 0xFFFF0000u);
      }
    }
  } else if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kGroup; ++i) {
      const int from = key + Traits::KeyOf(i / 2, i % 2 * 8);
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(scale[i / 2][i % 2]) : "r"(scales + from * 4));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kGroup; ++i) {
      const int from = key + Traits::KeyOf(i / 2, i % 2 * 8);
      uint16_t bits;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(scales + from * 2));
      scale[i / 2][i % 2] = BFloat16ToFloat(bits);
    }
  }
}

// scores[m][n] += K Q^T for key tiles first .. first + kGroup, over the channels of K's kStage-th
// stage.
template <typename Traits, int kStage = 0>
__device__ __forceinline__ void Multiply(uint32_t stage, const QueryTile<Traits>& query, int first,
                                         float (&scores)[Traits::kGroup][Traits::kTiles][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < Traits::kChunks; ++j) {
    uint4 keys[Traits::kGroup][2];
#pragma unroll
    for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Traits::KeyRow(Traits::KeyOf(first + m, g + 8 * half));
        keys[m][half] = LoadShared16(stage + row * Traits::kRowBytes +
                                     Traits::Swizzle(row, Traits::ChunkOf(t, j)) * 16);
      }
    }
#pragma unroll
    for (int w = 0; w < Traits::kMmaStepsPerChunk; ++w) {
      uint2 b[Traits::kTiles];
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
        b[n] = query.At(n, kStage * Traits::kStageSteps + j * Traits::kMmaStepsPerChunk + w);
      }
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
        const uint32_t* low = &keys[m][0].x;
        const uint32_t* high = &keys[m][1].x;
        uint32_t a0, a1, a2, a3;
        if constexpr (Traits::kQuantized) {
          Traits::Format::Widen(low[w], &a0, &a2);
          Traits::Format::Widen(high[w], &a1, &a3);
        } else {
          a0 = low[2 * w], a2 = low[2 * w + 1];
          a1 = high[2 * w], a3 = high[2 * w + 1];
        }
#pragma unroll
        for (int n = 0; n < Traits::kTiles; ++n) {
          Mma<Traits::Format::kOperand>(scores[m][n], a0, a1, a2, a3, b[n].x, b[n].y);
        }
      }
    }
  }
}

// The same of keys of any type; those of 4 bits lie in one stage.
template <typename Traits, int kStage = 0>
__device__ __forceinline__ void MultiplyKeys(uint32_t stage, const QueryTile<Traits>& query,
                                             int first,
                                             float (&scores)[Traits::kGroup][Traits::kTiles][4]) {
  if constexpr (Traits::kBlockScales) {
    MultiplyBlocks<Traits>(stage, query, first, scores);
  } else if constexpr (Traits::kKeyNibbles) {
    MultiplyNibbles<Traits>(stage, query, first, scores);
  } else {
    Multiply<Traits, kStage>(stage, query, first, scores);
  }
}

// Sets the scores of masked keys to `value`.
template <typename Traits>
__device__ __forceinline__ void MaskKeys(const KvTileMask& mask, int first, float value,
                                         float (&scores)[Traits::kGroup][Traits::kTiles][4]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if constexpr (Traits::kGeneral) {
        const RowKeys<Traits> seen(mask.row_infos + (8 * n + c) * sizeof(PackedRowInfo));
#pragma unroll
        for (int i = 0; i < 2 * Traits::kGroup; ++i) {
          const int key = mask.first_key + Traits::KeyOf(first + i / 2, g + i % 2 * 8);
          if (!seen.Sees(key)) scores[i / 2][n][2 * (i % 2) + c] = value;
        }
        continue;
      }
      const uint2 range = LoadShared8(mask.row_infos + (8 * n + c) * sizeof(PackedRowInfo));
      const int begin = static_cast<int>(range.x) - mask.first_key;
      const int end = static_cast<int>(range.y) - mask.first_key;
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = Traits::KeyOf(first + m, g + 8 * half);
          if (key < begin || key >= end) scores[m][n][2 * half + c] = value;
        }
      }
    }
  }
}

// Turns products with K's elements into scores in log2 units; those of masked keys become -inf.
template <typename Traits>
__device__ __forceinline__ void FinishScores(const AttentionParams& p, uint32_t stage,
                                             const KvTileMask& mask,
                                             const float (&factors)[Traits::kTiles][2], int first,
                                             float (&scores)[Traits::kGroup][Traits::kTiles][4]) {
  const int g = threadIdx.x % 32 / 4;
  float token_scales[Traits::kGroup][2];
  constexpr bool kTokenScaled = Traits::kPerTokenScales && !Traits::kBlockScales;
  if constexpr (Traits::kScalesAtOnce && kTokenScaled) {
    LoadTokenScales<Traits>(stage, first, TokenScaleType<Traits>(p), token_scales);
  }
#pragma unroll
  for (int m = 0; m < Traits::kGroup; ++m) {
    float scale[2] = {1.0f, 1.0f};
    if constexpr (Traits::kScalesAtOnce && kTokenScaled) {
      scale[0] = token_scales[m][0], scale[1] = token_scales[m][1];
    } else if constexpr (kTokenScaled) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale[half] = TokenScale<Traits>(stage, Traits::KeyOf(first + m, g + 8 * half),
                                         TokenScaleType<Traits>(p));
      }
    }
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x = scores[m][n][c];
        if constexpr (Traits::kChained) {  // no product may become a part of a later sum
          if constexpr (kTokenScaled) x = Mul(x, scale[c / 2]);
          scores[m][n][c] = Mul(x, factors[n][c % 2]);
        } else {
          if constexpr (kTokenScaled) x *= scale[c / 2];
          scores[m][n][c] = x * factors[n][c % 2];
        }
      }
    }
  }
  if (p.softcap > 0.0f) {
    const ScoreCap cap(p.softcap);
#pragma unroll
    for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[m][n][c] = cap(scores[m][n][c]);
      }
    }
  }
  if (mask.needs_mask) MaskKeys<Traits>(mask, first, -kInfinity, scores);
}

// Raises the running maxima to the scores' and brings sums and outputs to them.
template <typename Traits>
__device__ __forceinline__ void RaiseMaximum(
    const float (&scores)[Traits::kGroup][Traits::kTiles][4], TileState<Traits>* state) {
  float factor[Traits::kTiles][2];
  bool raised = false;
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float largest = -kInfinity;
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
        largest = fmaxf(largest, fmaxf(scores[m][n][c], scores[m][n][2 + c]));
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
      }
      const float before = state->maximum[n][c];
      const float maximum = fmaxf(before, largest);
      // While nothing is visible both are -inf, and sum and output are 0.
      factor[n][c] = maximum == before ? 1.0f : Exp2(before - maximum);
      raised |= maximum != before;
      state->maximum[n][c] = maximum;
      if constexpr (Traits::kChained) {
        state->sum[n][c] = Mul(state->sum[n][c], factor[n][c]);
      } else {
        state->sum[n][c] *= factor[n][c];
      }
    }
  }
  if (!__any_sync(0xFFFFFFFFu, raised)) return;
#pragma unroll
  for (int i = 0; i < Traits::kOutTiles; ++i) {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) state->out[i][n][c] *= factor[n][c % 2];
    }
  }
}

// Turns scores into probabilities (times 2^kShift) and adds them to the sums.
template <typename Traits>
__device__ __forceinline__ void Exponentiate(float (&scores)[Traits::kGroup][Traits::kTiles][4],
                                             TileState<Traits>* state) {
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float maximum = state->maximum[n][c];
      const float offset = kShift - (maximum == -kInfinity ? 0.0f : maximum);
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = scores[m][n][2 * half + c];
          if constexpr (Traits::kChained) {
            x = Exp2(Add(x, offset));
            state->sum[n][c] = Add(state->sum[n][c], x);
          } else {
            x = Exp2(x + offset);
            state->sum[n][c] += x;
          }
        }
      }
    }
  }
}

// 0xFF for every byte of an operand's word whose key lies in [begin, end).
__device__ __forceinline__ uint32_t KeepKeys(int begin, int end, int k0, int k1, int k2, int k3) {
  const auto byte = [&](int key, int i) {
    return key >= begin && key < end ? 0xFFu << (8 * i) : 0u;
  };
  return byte(k0, 0) | byte(k1, 1) | byte(k2, 2) | byte(k3, 3);
}

// out += V^T P^T for key tiles first .. first + kGroup and the channels of V's kStage-th stage.
template <typename Traits, int kStage = 0>
__device__ __forceinline__ void Accumulate(uint32_t stage, int first,
                                           const uint32_t (&p)[Traits::kGroup][Traits::kTiles][2],
                                           TileState<Traits>* state) {
  using Format = typename Traits::ValueFormat;
  constexpr DType kOperand = Format::kOperand;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int kFirst = kStage * Traits::kStageDimTiles;
#pragma unroll
  for (int i = 0; i < Traits::kStageDimTiles; ++i) {
    if constexpr (Traits::kTransposedV) {
      uint32_t words[2][Traits::kGroup];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = stage + (16 * i + g + 8 * half) * kBlockSize + 16 * t + 4 * first;
        if constexpr (Traits::kGroup == 4) {
          const uint4 v = LoadShared16(address);
          words[half][0] = v.x, words[half][1] = v.y, words[half][2] = v.z, words[half][3] = v.w;
        } else {
          const uint2 v = LoadShared8(address);
          words[half][0] = v.x, words[half][1] = v.y;
        }
      }
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
        uint32_t a0, a1, a2, a3;
        Format::Widen(words[0][m], &a0, &a2);
        Format::Widen(words[1][m], &a1, &a3);
#pragma unroll
        for (int n = 0; n < Traits::kTiles; ++n) {
          Mma<kOperand>(state->out[kFirst + i][n], a0, a1, a2, a3, p[m][n][0], p[m][n][1]);
        }
      }
    } else if constexpr (Traits::kQuantized) {
      // A 16-bit element of the load is two neighbouring channels of a key: the even ones are rows
      // g of the operand, the odd ones rows g + 8.
#pragma unroll
      for (int m = 0; m < Traits::kGroup; m += 2) {
        const int row = 16 * (first + m) + lane;
        const uint4 v =
            LoadMatricesTransposed(stage + row * Traits::kRowBytes + Traits::Swizzle(row, i) * 16);
        const uint32_t words[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          uint32_t a0, a1, a2, a3;
          Format::Widen(__byte_perm(words[u][0], 0, 0x3120), &a0, &a1);
          Format::Widen(__byte_perm(words[u][1], 0, 0x3120), &a2, &a3);
#pragma unroll
          for (int n = 0; n < Traits::kTiles; ++n) {
            Mma<kOperand>(state->out[kFirst + i][n], a0, a1, a2, a3, p[m + u][n][0],
                          p[m + u][n][1]);
          }
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < Traits::kGroup; ++m) {
        const int row = 16 * (first + m) + (lane & 7) + 8 * (lane >> 4);
        const int chunk = 2 * i + ((lane >> 3) & 1);
        const uint4 v = LoadMatricesTransposed(stage + row * Traits::kRowBytes +
                                               Traits::Swizzle(row, chunk) * 16);
#pragma unroll
        for (int n = 0; n < Traits::kTiles; ++n) {
          Mma<kOperand>(state->out[kFirst + i][n], v.x, v.y, v.z, v.w, p[m][n][0], p[m][n][1]);
        }
      }
    }
  }
}

// Masks of the words of a 16-byte piece of V in a stage: keys which some packed row sees.
template <typename Traits>
__device__ __forceinline__ uint4 KeptWords(const KvTileMask& mask, int piece) {
  const int begin = mask.begin, end = mask.end;
  if constexpr (Traits::kTransposedV) {
    const int k = 16 * (piece % (kBlockSize / 16));
    return make_uint4(KeepKeys(begin, end, k, k + 1, k + 8, k + 9),
                      KeepKeys(begin, end, k + 2, k + 3, k + 10, k + 11),
                      KeepKeys(begin, end, k + 4, k + 5, k + 12, k + 13),
                      KeepKeys(begin, end, k + 6, k + 7, k + 14, k + 15));
  } else {
    const int key = piece / (Traits::kRowBytes / 16);
    const uint32_t all = key >= begin && key < end ? 0xFFFFFFFFu : 0u;
    return make_uint4(all, all, all, all);
  }
}

// Whether V's element (key, channel) of the KV tile's channels in `stage` is a finite value.
template <typename Traits>
__device__ __forceinline__ bool IsFiniteValue(uint32_t stage, int key, int channel) {
  uint32_t bits;
  if constexpr (Traits::kTransposedV) {
    asm volatile("ld.shared.u8 %0, [%1];"
                 : "=r"(bits)
                 : "r"(stage + channel * kBlockSize + TokenSlot(key)));
  } else if constexpr (Traits::kQuantized) {
    asm volatile("ld.shared.u8 %0, [%1];"
                 : "=r"(bits)
                 : "r"(stage + key * Traits::kRowBytes + Traits::Swizzle(key, channel / 16) * 16 +
                       channel % 16));
  } else {
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=r"(bits)
                 : "r"(stage + key * Traits::kRowBytes + Traits::Swizzle(key, channel / 8) * 16 +
                       channel % 8 * 2));
  }
  return Traits::ValueFormat::NonFinite(bits) == 0;
}

// A non-finite value makes its channel NaN in the packed rows that see its key, and in no other:
// where packed rows differ it cannot go through the matrix product, in which 0 * NaN is NaN. This
// is rare and slow.
template <typename Traits>
__device__ __noinline__ void FindNonFinite(uint32_t stage, const KvTileMask& mask,
                                           uint32_t (&poisoned)[Traits::kTiles][2]) {
  const int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < Traits::kTiles; ++n) poisoned[n][0] = poisoned[n][1] = 0;
  for (int i = 0; i < 2 * Traits::kStageDimTiles; ++i) {
    const int channel = Traits::ChannelOf(i / 2, g + 8 * (i % 2));
    for (int key = max(mask.begin, 0); key < min(mask.end, Traits::kKvTile); ++key) {
      if (IsFiniteValue<Traits>(stage, key, channel)) continue;
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if constexpr (Traits::kGeneral) {
            const RowKeys<Traits> seen(mask.row_infos + (8 * n + c) * sizeof(PackedRowInfo));
            if (seen.Sees(mask.first_key + key)) poisoned[n][c] |= 1u << i;
            continue;
          }
          const uint2 range = LoadShared8(mask.row_infos + (8 * n + c) * sizeof(PackedRowInfo));
          const int position = mask.first_key + key;
          if (position >= static_cast<int>(range.x) && position < static_cast<int>(range.y)) {
            poisoned[n][c] |= 1u << i;
          }
        }
      }
    }
  }
}

template <typename Traits, int kStage>
__device__ __forceinline__ void PoisonPackedRows(const uint32_t (&poisoned)[Traits::kTiles][2],
                                                 TileState<Traits>* state) {
  const float nan = __int_as_float(0x7FFFFFFF);
#pragma unroll
  for (int i = 0; i < Traits::kStageDimTiles; ++i) {
#pragma unroll
    for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (poisoned[n][c % 2] >> (2 * i + c / 2) & 1) {
          state->out[kStage * Traits::kStageDimTiles + i][n][c] = nan;
        }
      }
    }
  }
}

// Where packed rows differ, makes the outputs of those that see a non-finite value of V's kStage-th
// stage NaN.
template <typename Traits, int kStage = 0>
__device__ __forceinline__ void PropagateNonFinite(uint32_t stage, const KvTileMask& mask,
                                                   TileState<Traits>* state) {
  constexpr int kPieces = Traits::kDataBytes / 16;
  if (!mask.packed_rows_differ) return;
  uint32_t bad = 0;
#pragma unroll 1
  for (int piece = threadIdx.x % 32; piece < kPieces; piece += 32) {
    const uint4 v = LoadShared16(stage + piece * 16), kept = KeptWords<Traits>(mask, piece);
    bad |= Traits::ValueFormat::NonFinite(v.x & kept.x) |
           Traits::ValueFormat::NonFinite(v.y & kept.y) |
           Traits::ValueFormat::NonFinite(v.z & kept.z) |
           Traits::ValueFormat::NonFinite(v.w & kept.w);
  }
  if (__any_sync(0xFFFFFFFFu, bad != 0)) {
    uint32_t poisoned[Traits::kTiles][2];
    FindNonFinite<Traits>(stage, mask, poisoned);
    PoisonPackedRows<Traits, kStage>(poisoned, state);
  }
}

// NaN scrubbing: makes V safe for a product in which some packed rows do not see some keys. Values
// of keys that no packed row sees become 0 (they may be anything), and where packed rows differ so
// do values that are not finite. The threads of the pipeline share the work, after all of them have
// inspected V.
template <typename Traits>
__device__ __forceinline__ void ScrubValues(uint32_t stage, const KvTileMask& mask) {
  constexpr int kPieces = Traits::kDataBytes / 16;
#pragma unroll 1
  for (int piece = threadIdx.x % Traits::kPipelineThreads; piece < kPieces;
       piece += Traits::kPipelineThreads) {
    uint4 v = LoadShared16(stage + piece * 16);
    const uint4 kept = KeptWords<Traits>(mask, piece);
    v.x &= kept.x, v.y &= kept.y, v.z &= kept.z, v.w &= kept.w;
    if (mask.packed_rows_differ) {
      v.x &= ~Traits::ValueFormat::NonFinite(v.x), v.y &= ~Traits::ValueFormat::NonFinite(v.y);
      v.z &= ~Traits::ValueFormat::NonFinite(v.z), v.w &= ~Traits::ValueFormat::NonFinite(v.w);
    }
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(stage + piece * 16), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  }
}

}  // namespace fastattn::cuda
