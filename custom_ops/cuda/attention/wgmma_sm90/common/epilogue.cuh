// The epilogue: a thread's two rows of the output are normalised and written, with their LSE.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/normaliser.h"
#include "common/numeric.h"
#include "cuda/attention/wgmma_sm90/common/work_tile.h"
#include "cuda/common/lane.cuh"
#include "params/attention.h"

namespace fastattn::cuda::wgmma_sm90 {

// P is exp2(score - shift), with the shift kLogPeak below the maximum of the row's scores: P lies
// in [0, kPeak]. Before a cast to e4m3 few small ones underflow then, and none saturates. (With
// Config::kLazy of wgmma_fp8 a row's shift may be anything that keeps P within e4m3.)
inline constexpr float kLogPeak = 8.0f;
inline constexpr float kPeak = 256.0f;

// Index in the work tile of a consumer thread's query h. kRecompute: see Thread().
template <bool kRecompute = false>
__device__ __forceinline__ int QueryIndex(int h) {
  const uint32_t thread = Thread<kRecompute>();
  return (thread - 128) / 32 * 16 + thread % 32 / 4 + 8 * h;
}

// Where a thread's two rows of the output go.
struct OutputRows {
  int head;
  int token[2];  // in q; -1: there is no such query

  // `first` is the thread's first query.
  __device__ __forceinline__ OutputRows(const WorkTile& tile, int first) : head(tile.head) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = first + 8 * h;
      token[h] = i < tile.queries ? tile.token + i : -1;
    }
  }
};

template <class C>
struct Epilogue {
  // `shift` is kLogPeak below a row's maximum in units of log2, or what P is relative to in its
  // place; `sum` is this thread's addend of the row's sum and, like o, kPeak times the true one. o
  // is relative to `v_scale`. Shared (of any kernel) has `tile`, `sink`, `output_scale` and
  // kRecomputeLane.
  template <class S>
  __device__ __forceinline__ static void Write(const AttentionParams& p, const S& shared,
                                               int buffer, const float (&o)[C::kOut],
                                               const float (&shift)[2], const float (&sum)[2],
                                               const float (&v_scale)[2]) {
    Write(p, shared, OutputRows(shared.tile[buffer], QueryIndex<S::kRecomputeLane>(0)), buffer, o,
          shift, sum, v_scale);
  }

  // The same for `rows`, of which some may be left out.
  template <class S>
  __device__ __forceinline__ static void Write(const AttentionParams& p, const S& shared,
                                               const OutputRows& rows, int buffer,
                                               const float (&o)[C::kOut], const float (&shift)[2],
                                               const float (&sum)[2], const float (&v_scale)[2]) {
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h] + __shfl_xor_sync(~0u, sum[h], 1);
      total += __shfl_xor_sync(~0u, total, 2);
      scale[h] =
          Normalise(p, rows, h, shift[h] + kLogPeak, total * (1 / kPeak), shared.sink[buffer]) *
          (1 / kPeak);
      // Without a visible key the output is 0, whatever the other factors are.
      if (scale[h] != 0.0f) scale[h] *= shared.output_scale[buffer] * v_scale[h];
    }
    switch (p.out_dtype) {
      case DType::kBFloat16:
        return Store16<false, S::kRecomputeLane>(p, rows, o, scale);
      case DType::kFloat16:
        return Store16<true, S::kRecomputeLane>(p, rows, o, scale);
      case DType::kE4M3:
        return Store8(p, rows, o, scale);
      default:
        return Store32(p, rows, o, scale);
    }
  }

 private:
  // Writes the row's LSE and returns what its sum over P * V is multiplied with. `peak` is in units
  // of log2; without a sink `sink` is -inf, which adds nothing.
  __device__ __forceinline__ static float Normalise(const AttentionParams& p,
                                                    const OutputRows& rows, int h, float peak,
                                                    float sum, float sink) {
    constexpr float kInf = __builtin_huge_valf();
    const bool empty = peak == -kInf;  // no score was above it
    const Normaliser found = NormaliserOf(empty, peak, sum, sink);
    if (p.lse != nullptr && rows.token[h] >= 0 && threadIdx.x % 4 == 0) {
      p.lse[static_cast<int64_t>(rows.head) * p.seqs.num_tokens + rows.token[h]] = found.lse;
    }
    return found.factor;
  }

  __device__ __forceinline__ static int64_t Offset(const AttentionParams& p, const OutputRows& rows,
                                                   int h) {
    return (static_cast<int64_t>(rows.token[h]) * p.num_heads + rows.head) * C::kOutDim;
  }

  template <bool kHalf>
  __device__ __forceinline__ static uint32_t Pack16(float a, float b) {
    if constexpr (kHalf) {
      const __half2 pair = __floats2half2_rn(a, b);
      return reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
      return reinterpret_cast<const uint32_t&>(pair);
    }
  }

  template <bool kHalf, bool kRecompute>
  __device__ __forceinline__ static void Store16(const AttentionParams& p, const OutputRows& rows,
                                                 const float (&o)[C::kOut],
                                                 const float (&scale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      auto* out = static_cast<uint16_t*>(p.out) + Offset(p, rows, h) + 8 * (threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < C::kOutDim / 8; j += 4) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (j + i) + 2 * h;
          w[i] = Pack16<kHalf>(o[at] * scale[h], o[at + 1] * scale[h]);
        }
        // A quad of lanes holds two columns each of four groups of eight: transposed, a lane has
        // the eight of one group.
        Transpose<kRecompute>(w);
        if (rows.token[h] >= 0) {
          *reinterpret_cast<uint4*>(out + 8 * j) = make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
    }
  }

  template <bool kRecompute>
  __device__ __forceinline__ static void Transpose(uint32_t (&w)[4]) {
    const uint32_t lane = Lane<kRecompute>();
    const bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
      w[i] = odd ? other : w[i];
      w[i + 1] = odd ? w[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = __shfl_xor_sync(~0u, high ? w[i] : w[i + 2], 2);
      w[i] = high ? other : w[i];
      w[i + 2] = high ? w[i + 2] : other;
    }
  }

  __device__ __forceinline__ static void Store8(const AttentionParams& p, const OutputRows& rows,
                                                const float (&o)[C::kOut],
                                                const float (&scale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (rows.token[h] < 0) continue;
      auto* out = static_cast<uint8_t*>(p.out) + Offset(p, rows, h) + 2 * (threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < C::kOutDim / 8; ++j) {
        const int at = 4 * j + 2 * h;
        uint16_t pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
            : "=h"(pair)
            : "f"(o[at + 1] * scale[h]), "f"(o[at] * scale[h]));
        *reinterpret_cast<uint16_t*>(out + 8 * j) = pair;
      }
    }
  }

  __device__ __forceinline__ static void Store32(const AttentionParams& p, const OutputRows& rows,
                                                 const float (&o)[C::kOut],
                                                 const float (&scale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (rows.token[h] < 0) continue;
      auto* out = static_cast<float*>(p.out) + Offset(p, rows, h) + 2 * (threadIdx.x % 4);
#pragma unroll
      for (int j = 0; j < C::kOutDim / 8; ++j) {
        const int at = 4 * j + 2 * h;
        *reinterpret_cast<float2*>(out + 8 * j) =
            make_float2(o[at] * scale[h], o[at + 1] * scale[h]);
      }
    }
  }
};

}  // namespace fastattn::cuda::wgmma_sm90
