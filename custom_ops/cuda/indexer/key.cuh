// indexer_kv_compress_insert for one page format: gather, per-channel softmax, RMSNorm, rotation,
// bf16, quantisation, insertion.
//
// Only tokens whose positions complete a group need work, so that a CTA looks through a tile of up
// to 32 tokens and shares those out among its threads. A row of the state lies in HEAD / 4 threads
// of 4 channels. At ratio 4 these threads hold all 8 rows of a group, each a segment of the sums,
// and every load is in flight at once. At ratio 128 the 8 segments of 16 rows lie in 8 such teams,
// which meet in shared memory; the scores are read twice, the second time from cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/e2m1.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/rotate.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/indexer/encode.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

inline constexpr int kKeyChannels = 4;  // of a thread
inline constexpr int kKeySegments = 8;  // partial sums of the softmax
template <IndexerQuant kKind, DType kStateDType, int kCompressRatio>
struct KeyTraits {
  static constexpr IndexerQuant kQuant = kKind;
  static constexpr DType kState = kStateDType;
  static constexpr int kRatio = kCompressRatio;
  static constexpr IndexerPageFormat kFormat = PageFormatOf(kQuant);
  static constexpr int kHead = kFormat.head_dim;
  static constexpr int kStateWidth = kRatio == 4 ? 2 * kHead : kHead;
  static constexpr int kRows = kRatio == 4 ? 8 : 128;
  static constexpr int kTeamThreads = kHead / kKeyChannels;
  static constexpr int kTeams = kRatio == 4 ? 1 : kKeySegments;  // of a group
  static constexpr int kTeamRows = kRows / kTeams;
  static constexpr int kGroupThreads = kTeamThreads * kTeams;
  static constexpr int kThreads = kGroupThreads > 256 ? kGroupThreads : 256;
  static constexpr int kGroups = kThreads / kGroupThreads;  // at a time
  static constexpr int kHeadWarps = kTeamThreads / 32;
};

struct KeyGrid {
  int tile;            // tokens of a CTA, at most 32
  bool state_aligned;  // for loads of 4 values
  bool pages_aligned;  // for stores of 4 bytes
};

// Shared memory of a CTA's groups.
template <typename Traits>
struct KeyShared {
  float square_sums[Traits::kGroups][Traits::kHeadWarps];
  // Ratio 128: a value a segment and channel, read and written 4 channels at a time.
  alignas(16) float numerator[Traits::kTeams > 1 ? kKeySegments : 1]
                             [Traits::kHead];  // the maxima before
  alignas(16) float denominator[Traits::kTeams > 1 ? kKeySegments : 1][Traits::kHead];
};

// Whether a token completes a group and has somewhere to put it.
template <typename Traits>
__device__ __forceinline__ bool IsWanted(const IndexerKvParams& p, int64_t token) {
  const int64_t position = p.positions.At(token);
  const int64_t slot = p.kv_slots.At(token);
  const int batch_idx = __ldg(p.batch_ids + token);
  return position >= 0 && position % Traits::kRatio == Traits::kRatio - 1 &&
         p.state_slots.At(token) >= 0 && slot >= 0 && slot / p.page_size < p.num_pages &&
         batch_idx >= 0 && batch_idx < p.batch;
}

// Element offset of the state row of `at`, a position >= 0; -1 if its block is unassigned.
__device__ __forceinline__ int64_t FindStateRow(const IndexerKvParams& p, int batch_idx, int64_t at,
                                                int row_width) {
  const int64_t index = at / p.state_block;
  if (index >= p.max_blocks) return -1;
  const int block = __ldg(BlockEntry(p.block_tables, p.max_blocks, batch_idx, index));
  if (block < 0 || block >= p.num_state_blocks) return -1;
  return block * p.state_block_stride + (at - index * p.state_block) * row_width;
}

// The state rows of a team: lane j has the offset of row j, or -1 if there is no such row.
template <typename Traits>
struct TeamRows {
  int64_t own;

  __device__ __forceinline__ int64_t Row(int j) const { return __shfl_sync(kFullWarp, own, j); }
};

// Slice of the state row that row j of a group uses: the later half of an overlapping group keeps
// its values in the second one.
template <typename Traits>
__device__ __forceinline__ constexpr int SliceOf(int j) {
  return j >= Traits::kRatio ? Traits::kHead : 0;
}

// Sums of a segment for the channels of a thread.
struct Sums {
  float numerator[kKeyChannels];
  float denominator[kKeyChannels];
};

__device__ __forceinline__ void Accumulate(const float (&score)[kKeyChannels],
                                           const float (&value)[kKeyChannels],
                                           const float (&maximum)[kKeyChannels], Sums& sums) {
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) {
    const float e = ExpNonPositive(Sub(score[c], maximum[c]));
    sums.numerator[c] = Add(sums.numerator[c], Mul(e, value[c]));
    sums.denominator[c] = Add(sums.denominator[c], e);
  }
}

__device__ __forceinline__ void Raise(const float (&score)[kKeyChannels],
                                      float (&maximum)[kKeyChannels]) {
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) {
    maximum[c] = score[c] > maximum[c] ? score[c] : maximum[c];
  }
}

// Where no score is above -inf, the maximum becomes 0, as -inf less -inf would be NaN.
__device__ __forceinline__ void FinishMaximum(float (&maximum)[kKeyChannels]) {
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) {
    if (FloatBits(maximum[c]) == 0xFF800000u) maximum[c] = 0.0f;
  }
}

// Scores of -inf throughout leave nothing to average.
__device__ __forceinline__ float Average(float numerator, float denominator) {
  return denominator == 0.0f ? 0.0f : Div(numerator, denominator);
}

// Ratio 4: a thread sums all 8 rows, each of them a segment.
template <typename Traits>
__device__ __forceinline__ void CompressHere(const IndexerKvParams& p, const KeyGrid& grid,
                                             const TeamRows<Traits>& rows, int channel,
                                             float (&x)[kKeyChannels]) {
  float score[kKeySegments][kKeyChannels], value[kKeySegments][kKeyChannels];
  bool present[kKeySegments];
#pragma unroll
  for (int j = 0; j < kKeySegments; ++j) {
    const int64_t row = rows.Row(j);
    present[j] = row >= 0;
#pragma unroll
    for (int c = 0; c < kKeyChannels; ++c) score[j][c] = value[j][c] = 0.0f;
    if (present[j]) {
      const int64_t element = row + SliceOf<Traits>(j) + channel;
      LoadFour(p.state, Traits::kState, element + Traits::kStateWidth, grid.state_aligned,
               score[j]);
      LoadFour(p.state, Traits::kState, element, grid.state_aligned, value[j]);
    }
  }
  float maximum[kKeyChannels];
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) maximum[c] = BitsFloat(0xFF800000u);
#pragma unroll
  for (int j = 0; j < kKeySegments; ++j) {
    if (present[j]) Raise(score[j], maximum);
  }
  FinishMaximum(maximum);
  Sums sums[kKeySegments] = {};
#pragma unroll
  for (int j = 0; j < kKeySegments; ++j) {
    if (present[j]) Accumulate(score[j], value[j], maximum, sums[j]);
  }
#pragma unroll
  for (int width = kKeySegments / 2; width >= 1; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
#pragma unroll
      for (int c = 0; c < kKeyChannels; ++c) {
        sums[i].numerator[c] = Add(sums[2 * i].numerator[c], sums[2 * i + 1].numerator[c]);
        sums[i].denominator[c] = Add(sums[2 * i].denominator[c], sums[2 * i + 1].denominator[c]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) {
    x[c] = Average(sums[0].numerator[c], sums[0].denominator[c]);
  }
}

// Ratio 128: a team sums one segment; all teams get the result. All threads of the CTA take part.
template <typename Traits>
__device__ __forceinline__ void CompressTogether(const IndexerKvParams& p, const KeyGrid& grid,
                                                 const TeamRows<Traits>& rows, int team,
                                                 int channel, KeyShared<Traits>& shared,
                                                 float (&x)[kKeyChannels]) {
  float maximum[kKeyChannels];
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) maximum[c] = BitsFloat(0xFF800000u);
#pragma unroll 8
  for (int j = 0; j < Traits::kTeamRows; ++j) {
    const int64_t row = rows.Row(j);
    float score[kKeyChannels];
    if (row >= 0) {
      LoadFour(p.state, Traits::kState, row + Traits::kStateWidth + channel, grid.state_aligned,
               score);
      Raise(score, maximum);
    }
  }
  float4* own = reinterpret_cast<float4*>(&shared.numerator[team][channel]);
  *own = make_float4(maximum[0], maximum[1], maximum[2], maximum[3]);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKeySegments; ++i) {
    const float4 of_team = *reinterpret_cast<const float4*>(&shared.numerator[i][channel]);
    Raise({of_team.x, of_team.y, of_team.z, of_team.w}, maximum);
  }
  FinishMaximum(maximum);
  Sums sums = {};
#pragma unroll 4
  for (int j = 0; j < Traits::kTeamRows; ++j) {
    const int64_t row = rows.Row(j);
    if (row >= 0) {
      float score[kKeyChannels], value[kKeyChannels];
      LoadFour(p.state, Traits::kState, row + Traits::kStateWidth + channel, grid.state_aligned,
               score);
      LoadFour(p.state, Traits::kState, row + channel, grid.state_aligned, value);
      Accumulate(score, value, maximum, sums);
    }
  }
  __syncthreads();
  *own = make_float4(sums.numerator[0], sums.numerator[1], sums.numerator[2], sums.numerator[3]);
  *reinterpret_cast<float4*>(&shared.denominator[team][channel]) = make_float4(
      sums.denominator[0], sums.denominator[1], sums.denominator[2], sums.denominator[3]);
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) {
    float numerator[kKeySegments], denominator[kKeySegments];
#pragma unroll
    for (int i = 0; i < kKeySegments; ++i) {
      numerator[i] = shared.numerator[i][channel + c];
      denominator[i] = shared.denominator[i][channel + c];
    }
#pragma unroll
    for (int width = kKeySegments / 2; width >= 1; width /= 2) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        numerator[i] = Add(numerator[2 * i], numerator[2 * i + 1]);
        denominator[i] = Add(denominator[2 * i], denominator[2 * i + 1]);
      }
    }
    x[c] = Average(numerator[0], denominator[0]);
  }
}

// x / rms(x) * weight; the squares are summed as a tree of neighbours. All threads take part.
template <typename Traits>
__device__ __forceinline__ void NormKey(const IndexerKvParams& p, int group, int channel,
                                        KeyShared<Traits>& shared, float (&x)[kKeyChannels]) {
  float sum = Add(Add(Mul(x[0], x[0]), Mul(x[1], x[1])), Add(Mul(x[2], x[2]), Mul(x[3], x[3])));
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    sum = Add(sum, __shfl_xor_sync(kFullWarp, sum, lanes));
  }
  if constexpr (Traits::kHeadWarps > 1) {
    static_assert(Traits::kHeadWarps == 4);
    float* sums = shared.square_sums[group];
    // All teams of a group hold the same sums; the first writes them.
    if (threadIdx.x % 32 == 0 && threadIdx.x % Traits::kGroupThreads < Traits::kTeamThreads) {
      sums[channel / 128] = sum;
    }
    __syncthreads();
    sum = Add(Add(sums[0], sums[1]), Add(sums[2], sums[3]));
    __syncthreads();
  }
  const float mean = Mul(sum, 1.0f / Traits::kHead);
  const float inverse = Div(1.0f, Sqrt(Add(mean, p.rms_norm_eps)));
#pragma unroll
  for (int c = 0; c < kKeyChannels; ++c) {
    x[c] = Mul(Mul(x[c], inverse), LoadScale(p.rms_weight, p.rms_weight_dtype, channel + c));
  }
}

__device__ __forceinline__ void RotateKey(const IndexerKvParams& p, int64_t position, int pair,
                                          float (&x)[kKeyChannels]) {
  position = min(max(position, int64_t{0}), p.max_positions - 1);
  const int64_t row = position * kIndexerRopeDim;
#pragma unroll
  for (int i = 0; i < kKeyChannels / 2; ++i) {
    const float cos = LoadScale(p.cos_sin, p.cos_sin_dtype, row + pair + i);
    const float sin = LoadScale(p.cos_sin, p.cos_sin_dtype, row + kIndexerRopeDim / 2 + pair + i);
    RotatePair(cos, sin, x[2 * i], x[2 * i + 1]);
  }
}

__device__ __forceinline__ uint32_t AmaxOfFour(const float (&x)[kKeyChannels]) {
  return max(max(AbsBits(x[0]), AbsBits(x[1])), max(AbsBits(x[2]), AbsBits(x[3])));
}

__device__ __forceinline__ uint32_t EncodeFp8(const float (&x)[kKeyChannels], float scale) {
  const float inverse = PowerOfTwoInverse(scale);
  return PackCodes<DType::kE4M3>(Mul(x[0], inverse), Mul(x[1], inverse), Mul(x[2], inverse),
                                 Mul(x[3], inverse));
}

// Stores the codes and scales of a bf16-rounded token if `live`; `rounded` has its bf16 pairs.
// Whole warps take part.
template <typename Traits>
__device__ __forceinline__ void InsertKey(const float (&x)[kKeyChannels], uint2 rounded,
                                          int channel, uint8_t* codes, uint8_t* scales,
                                          bool aligned, bool live) {
  if constexpr (Traits::kQuant == IndexerQuant::kFp8) {
    const float scale = PowerOfTwoFp8Scale(LanesMax<32>(AmaxOfFour(x)));
    const uint32_t word = EncodeFp8(x, scale);
    if (live) StoreWord(codes + channel, word, aligned);
    if (live && channel == 0) StoreWord(scales, FloatBits(scale), aligned);
  } else if constexpr (Traits::kQuant == IndexerQuant::kMxfp4) {
    float amax = 0.0f;  // fmaxf passes over a NaN
#pragma unroll
    for (int c = 0; c < kKeyChannels; ++c) amax = fmaxf(amax, fabsf(x[c]));
    const uint8_t byte = MxScaleByte(LanesMax<kMxBlock / kKeyChannels>(FloatBits(amax)));
    const float inverse = UE8M0Inverse(byte);
    const uint32_t four = PackE2M1x4<true>(
        {Mul(x[0], inverse), Mul(x[1], inverse), Mul(x[2], inverse), Mul(x[3], inverse)});
    const uint32_t word = four | __shfl_down_sync(kFullWarp, four, 1) << 16;
    if (live && channel % 8 == 0) StoreWord(codes + channel / 2, word, aligned);
    if (live && channel % kMxBlock == 0) scales[channel / kMxBlock] = byte;
  } else {
    constexpr int kPlain = kIndexerWideHeadDim - kIndexerRopeDim;
    const float scale = PowerOfTwoFp8Scale(LanesMax<kWideFp8Block / kKeyChannels>(AmaxOfFour(x)));
    const bool plain = channel < kPlain;
    const uint32_t word = EncodeFp8(x, scale);
    if (live && plain) StoreWord(codes + channel, word, aligned);
    if (live && !plain) {
      uint8_t* to = codes + kPlain + 2 * (channel - kPlain);
      StoreWord(to, rounded.x, aligned);
      StoreWord(to + 4, rounded.y, aligned);
    }
    if (live && channel % kWideFp8Block == 0) {
      scales[channel / kWideFp8Block] = plain ? PowerOfTwoToUe8m0(scale) : 0;
    }
  }
}

// Index of the n-th set bit (n from 0); there is one.
__device__ __forceinline__ int NthBit(uint32_t mask, int n) {
  for (int i = 0; i < n; ++i) mask &= mask - 1;
  return __ffs(mask) - 1;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    KeyKernel(const __grid_constant__ IndexerKvParams p, KeyGrid grid) {
  __shared__ alignas(16) KeyShared<Traits> shared;
  const int lane = threadIdx.x % 32;
  const int group = threadIdx.x / Traits::kGroupThreads;
  const int team = threadIdx.x / Traits::kTeamThreads % Traits::kTeams;
  const int channel = threadIdx.x % Traits::kTeamThreads * kKeyChannels;

  // Every warp looks for itself, and all of them find the same.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * grid.tile;
  const bool inside = lane < grid.tile && first + lane < p.num_tokens;
  const uint32_t wanted = __ballot_sync(kFullWarp, inside && IsWanted<Traits>(p, first + lane));
  const int count = __popc(wanted);

  for (int base = 0; base < count; base += Traits::kGroups) {
    bool live = base + group < count;
    const int64_t token = first + (live ? NthBit(wanted, base + group) : 0);
    const int64_t position = live ? p.positions.At(token) : 0;
    TeamRows<Traits> rows{-1};
    bool assigned = true;
    const int64_t at = position - Traits::kRows + 1 + team * Traits::kTeamRows + lane;
    if (live && lane < Traits::kTeamRows && at >= 0) {
      rows.own = FindStateRow(p, __ldg(p.batch_ids + token), at, 2 * Traits::kStateWidth);
      assigned = rows.own >= 0;
    }
    float x[kKeyChannels];
    if constexpr (Traits::kTeams == 1) {
      live = __all_sync(kFullWarp, assigned) && live;
      CompressHere<Traits>(p, grid, rows, channel, x);
    } else {
      // A CTA has one group, so that all threads agree; the barrier frees the shared memory as
      // well.
      if (!__syncthreads_and(assigned)) continue;
      CompressTogether<Traits>(p, grid, rows, team, channel, shared, x);
    }
    NormKey<Traits>(p, group, channel, shared, x);
    constexpr int kFirstRope = Traits::kHead - kIndexerRopeDim;
    if (channel >= kFirstRope) {
      RotateKey(p, position - (Traits::kRatio - 1), (channel - kFirstRope) / 2, x);
    }
    __syncwarp();
    const uint2 rounded =
        make_uint2(PackPair<DType::kBFloat16>(x[0], x[1]), PackPair<DType::kBFloat16>(x[2], x[3]));
    x[0] = BitsFloat(rounded.x << 16), x[1] = BitsFloat(rounded.x & 0xFFFF0000u);
    x[2] = BitsFloat(rounded.y << 16), x[3] = BitsFloat(rounded.y & 0xFFFF0000u);
    live = live && team == 0;
    const int64_t slot = live ? p.kv_slots.At(token) : 0;
    const int64_t page = slot / p.page_size, row = slot - page * p.page_size;
    uint8_t* codes = p.kv_cache + page * p.page_stride;
    InsertKey<Traits>(
        x, rounded, channel, codes + row * Traits::kFormat.code_bytes,
        codes + p.page_size * Traits::kFormat.code_bytes + row * Traits::kFormat.scale_bytes,
        grid.pages_aligned, live);
  }
}

template <typename Traits>
cudaError_t LaunchKeyVariant(const IndexerKvParams& p, cudaStream_t stream) {
  // Small steps go to many CTAs; 32 tokens are as many as a warp looks through at once.
  constexpr int64_t kWantedCtas = 264;
  int64_t tile = (p.num_tokens + kWantedCtas - 1) / kWantedCtas;
  tile = tile < Traits::kGroups ? Traits::kGroups : tile > 32 ? 32 : tile;
  KeyGrid grid;
  grid.tile = static_cast<int>(tile);
  grid.state_aligned = IsAligned(p.state, 4 * SizeOf(Traits::kState));
  grid.pages_aligned = IsAligned(p.kv_cache, 4);
  return LaunchKernel(KeyKernel<Traits>, GridSize((p.num_tokens + tile - 1) / tile),
                      Traits::kThreads, stream, p, grid);
}

template <IndexerQuant kQuant>
cudaError_t LaunchIndexerKey(const IndexerKvParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<DType::kFloat32, DType::kBFloat16>(p.state_dtype, "state dtype", [&](auto state) {
    dispatch<4, 128>(p.compress_ratio, "compress_ratio", [&](auto ratio) {
      status = LaunchKeyVariant<KeyTraits<kQuant, decltype(state)::value, decltype(ratio)::value>>(
          p, stream);
    });
  });
  return status;
}

}  // namespace fastattn::cuda
