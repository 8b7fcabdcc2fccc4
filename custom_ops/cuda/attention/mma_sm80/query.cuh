// Loads a work tile's queries as 16-bit operands, with the factor that turns a product with K's
// codes into a score.
#pragma once

#include <cstdint>

#include "common/normaliser.h"
#include "common/numeric.h"
#include "cuda/attention/mma_sm80/nibbles.cuh"
#include "cuda/attention/mma_sm80/row_holes.cuh"
#include "cuda/attention/mma_sm80/traits.cuh"
#include "cuda/attention/shared/scales.cuh"
#include "cuda/attention/split_kv/shared/packed_rows.cuh"
#include "cuda/attention/split_kv/shared/schedule.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/mma.cuh"

namespace fastattn::cuda {

// A scale of K that is constant over a cache's blocks and a head's channels.
template <typename Traits>
__device__ __forceinline__ float KeyScale(const AttentionParams& p, int kv_head) {
  if constexpr (Traits::kQuantized && Traits::kPaged && !Traits::kStageScales) {
    const PagedCache& cache = p.cache;
    const ScaleScheme granularity = cache.k_granularity;
    if (granularity != ScaleScheme::kChannel) {
      return LoadHeadScale(cache, cache.k_scales, granularity, kv_head);
    }
  }
  return 1.0f;
}

// What the product of a query and K's codes is multiplied with, per-token scales of K left out.
template <typename Traits>
__device__ __forceinline__ float ScoreFactor(const AttentionParams& p, int batch_idx, int token,
                                             int kv_head, int head, float key_scale) {
  float factor = p.softmax_scale * key_scale;
  const DescaleAt at{batch_idx, head};
  factor = TimesDescale(factor, p.q_descale, token, kv_head, at);
  if constexpr (Traits::kQuantized && !Traits::kPaged) {
    factor = TimesDescale(factor, p.ragged.k_descale, token, kv_head, at);
  }
  return factor;
}

// Four channels as they lie in memory, 8 or 4 bytes, which their strides allow to load at once.
__device__ __forceinline__ uint2 LoadRaw(const AttentionParams& p, int64_t offset) {
  if (p.q_dtype == DType::kE4M3) {
    return make_uint2(
        __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(p.q) + offset)), 0);
  }
  return __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.q) + offset));
}

__device__ __forceinline__ void RawToFloat(const uint2& raw, DType dtype, float (&out)[4]) {
  if (dtype == DType::kBFloat16) {
    out[0] = __uint_as_float(raw.x << 16), out[1] = __uint_as_float(raw.x & 0xFFFF0000u);
    out[2] = __uint_as_float(raw.y << 16), out[3] = __uint_as_float(raw.y & 0xFFFF0000u);
  } else if (dtype == DType::kFloat16) {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
  } else {
    CodesToFloat<DType::kE4M3>(raw.x, out);
  }
}

// The B operands of K Q^T: of lane (g, t), column tile n and step s, the words hold 4 channels (see
// AttentionTraits::StepOf) of packed row 8 n + g.
template <typename Traits>
struct QueryTile {
  static constexpr int kKept = Traits::kQueryInRegisters ? Traits::kTiles : 1;
  uint32_t words[kKept][Traits::kMmaSteps][2];
  uint32_t shared;                                         // a lane's words of tile n and step s
  float bias[Traits::kKeyBiased ? Traits::kTiles : 1][2];  // FindQueryBias

  // From shared memory to registers, if they live there.
  __device__ __forceinline__ void Fetch() {
    if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
#pragma unroll
        for (int s = 0; s < Traits::kMmaSteps; ++s) {
          const uint2 pair = LoadShared8(shared + (n * Traits::kMmaSteps + s) * 256);
          words[n][s][0] = pair.x, words[n][s][1] = pair.y;
        }
      }
    }
    if constexpr (Traits::kKeyBiased) {
#pragma unroll
      for (int n = 0; n < Traits::kTiles; ++n) {
        FindQueryBias<Traits>([&](int s) { return At(n, s); }, bias[n]);
      }
    }
  }

  // What accumulator c of the scores of tile n begins with.
  __device__ __forceinline__ float Start(int n, int c) const {
    if constexpr (Traits::kKeyBiased) return bias[n][c % 2];
    return 0.0f;
  }

  __device__ __forceinline__ uint2 At(int n, int s) const {
    if constexpr (Traits::kQueryInRegisters) {
      return make_uint2(words[n][s][0], words[n][s][1]);
    } else {
      return LoadShared8(shared + (n * Traits::kMmaSteps + s) * 256);
    }
  }
};

// Stores channels 4 * quad .. 4 * quad + 3 of packed row c as operands of 4-bit keys: a word of K
// is 8 channels, of which the first four are the low halves of two steps' operands. A lane has a
// quarter of each part of a key, or of each block. Channels whose int4 codes lie lower count 2^4 as
// much.
template <typename Traits>
__device__ __forceinline__ void StoreNibbleQuery(const float (&x)[4], int c, int quad,
                                                 char* queries) {
  constexpr int kQuads = 2 * Traits::kNibbleWords;  // of a lane and part
  int lane = c % 8 * 4 + quad / kQuads % 4;
  int word = quad / (4 * kQuads) * Traits::kNibbleWords + quad % kQuads / 2;
  if constexpr (Traits::kBlockScales) {  // a word of each block (MultiplyBlocks)
    lane = c % 8 * 4 + quad / 2 % 4;
    word = quad / 8;
  }
  char* const to =
      queries + ((c / 8 * Traits::kMmaSteps + 2 * word) * 32 + lane) * 8 + quad % 2 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool low = Traits::kKeyBiased && i % 2 == 0;
    const __half value = __float2half_rn(low ? x[i] * 16.0f : x[i]);
    *reinterpret_cast<__half*>(to + i / 2 * 256 + i % 2 * 4) = value;
  }
}

// Whether a head has channels from 4 * quad on: those that only fill a stage are 0.
template <typename Traits>
__device__ __forceinline__ bool InHead(int quad) {
  return Traits::kKeyDim == Traits::kHeadDim || 4 * quad < Traits::kHeadDim;
}

__device__ __forceinline__ float LargestOf(const float (&x)[4]) {
  return fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
}

template <typename Traits>
__device__ __forceinline__ PackedRowInfo InfoOf(const AttentionParams& p, const AttentionTask& task,
                                                const Segment& segment, int c, float key_scale,
                                                RowHoles* holes) {
  const PackedRow packed_row =
      PackedRowOf(task, segment.shape, segment.head, segment.tile * Traits::kTileRows + c);
  PackedRowInfo info;
  info.keys = {0, 0};
  info.score_factor = 0.0f;
  info.out = -1;
  if constexpr (Traits::kGeneral) *holes = {};
  if (!packed_row.valid) return info;
  info.score_factor = ScoreFactor<Traits>(p, segment.batch_idx, packed_row.token, segment.head,
                                          packed_row.head, key_scale) *
                      kLog2E;
  // The unit of a product of a query and int4 codes.
  if constexpr (Traits::kKeyBiased) info.score_factor *= 0.0625f / Traits::Format::kUnit;
  info.keys = KeysOfQuery(p, segment.shape, packed_row.token - segment.shape.q_begin);
  if (p.mask_offsets != nullptr) {
    const int* offsets = p.mask_offsets + 2 * static_cast<int64_t>(packed_row.token);
    info.keys = Intersect(info.keys, {__ldg(offsets), __ldg(offsets + 1)});
    info.keys.end = max(info.keys.end, 0);
  }
  if constexpr (Traits::kGeneral) {
    *holes = TakeHoles(p, segment.shape, segment.batch_idx, segment.head,
                       packed_row.token - segment.shape.q_begin, &info.keys);
  }
  info.out =
      (static_cast<int64_t>(packed_row.token) * p.num_heads + packed_row.head) * Traits::kValueDim;
  return info;
}

// A thread's loads of a work tile's queries: lanes share a packed row's channels, four each, or
// four times as many as a large head needs. A cluster starts them ahead of its first keys, behind
// which they would wait.
template <typename Traits>
struct QueryLoads {
  static constexpr int kRowQuads = Traits::kKeyDim / 4;
  static constexpr int kLanes = kRowQuads <= 32       ? kRowQuads
                                : kRowQuads % 32 == 0 ? 32
                                                      : 16;  // of a packed row
  static constexpr int kQuads = kRowQuads / kLanes;          // of a lane, kLanes apart
  static constexpr int kAtOnce = Traits::kThreads / kLanes;
  static constexpr int kPasses = Traits::kTileRows / kAtOnce;
  static constexpr int kBatch = kPasses < 4 ? kPasses : 4;
  static_assert((kLanes & (kLanes - 1)) == 0 && kPasses * kAtOnce == Traits::kTileRows,
                "lanes exchange by XOR, and every packed_row has its pass");
  static_assert(kQuads * kLanes == kRowQuads);
  uint2 raw[kBatch][kQuads];
  float key_scale, value_scale;

  __device__ __forceinline__ void StartBatch(const AttentionParams& p, const AttentionTask& task,
                                             const Segment& segment, int pass) {
    const int quad = threadIdx.x % kLanes;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int c = (pass + b) * kAtOnce + threadIdx.x / kLanes;
      const PackedRow packed_row =
          PackedRowOf(task, segment.shape, segment.head, segment.tile * Traits::kTileRows + c);
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        raw[b][i] = make_uint2(0, 0);
        if (packed_row.valid && InHead<Traits>(quad + i * kLanes)) {
          raw[b][i] = LoadRaw(p, packed_row.token * p.q_token_stride +
                                     packed_row.head * p.q_head_stride + 4 * (quad + i * kLanes));
        }
      }
    }
  }

  __device__ __forceinline__ void Start(const AttentionParams& p, const AttentionTask& task,
                                        const Segment& segment) {
    StartBatch(p, task, segment, 0);
    if (threadIdx.x < Traits::kTileRows) {
      key_scale = KeyScale<Traits>(p, segment.head);
      value_scale = ValueScale(p, segment.batch_idx, segment.head);
    }
  }
};

// Writes the work tile's queries and packed row infos to shared memory, the first batch from
// `loads`.
template <typename Traits>
__device__ __forceinline__ void StoreQueries(const AttentionParams& p, const AttentionTask& task,
                                             const Segment& segment, QueryLoads<Traits>* loads,
                                             char* shared) {
  constexpr int kLanes = QueryLoads<Traits>::kLanes;
  constexpr int kAtOnce = QueryLoads<Traits>::kAtOnce;
  constexpr int kPasses = QueryLoads<Traits>::kPasses;
  constexpr int kBatch = QueryLoads<Traits>::kBatch;
  constexpr int kQuads = QueryLoads<Traits>::kQuads;
  PackedRowInfo* infos = reinterpret_cast<PackedRowInfo*>(shared + Traits::kRowInfoOffset);
  const int quad = threadIdx.x % kLanes;
  int2 steps[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) steps[q] = Traits::StepOf(quad + q * kLanes);
#pragma unroll 1
  for (int pass = 0; pass < kPasses; pass += kBatch) {
    if (pass > 0) loads->StartBatch(p, task, segment, pass);
    // Meanwhile, what the packed rows see and their scales.
    if (pass == 0 && threadIdx.x < Traits::kTileRows) {
      RowHoles holes;
      const PackedRowInfo info =
          InfoOf<Traits>(p, task, segment, threadIdx.x, loads->key_scale, &holes);
      if constexpr (Traits::kGeneral) {
        reinterpret_cast<RowHoles*>(shared + Traits::kHolesOffset)[threadIdx.x] = holes;
      }
      PackedRowInfo& target = infos[threadIdx.x];
      target.keys = info.keys;
      target.score_factor = info.score_factor;
      target.value_scale = loads->value_scale;
      target.out = info.out;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int c = (pass + b) * kAtOnce + threadIdx.x / kLanes;
      float x[kQuads][4];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) RawToFloat(loads->raw[b][q], p.q_dtype, x[q]);
      if constexpr (Traits::kQuantized && Traits::kPaged && !Traits::kStageScales) {
        if (p.cache.k_granularity == ScaleScheme::kChannel) {
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
            const int own = quad + q * kLanes;
            if (!InHead<Traits>(own)) continue;
            const int64_t first =
                ChannelScaleIndex<int64_t>(segment.head, 4 * own, Traits::kHeadDim);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              x[q][i] *= LoadScale(p.cache.k_scales, p.cache.scale_dtype, first + i);
            }
          }
        }
      }
      if constexpr (Traits::kQuantized) {
        // fp16 has more mantissa than bf16 and less range: bring the largest channel to
        // 2^9 .. 2^10; over E2M1 to 2^15 .. 2^16, so that the query's factor has room for the unit
        // of K's operands, 2^14: it then is finite wherever the query times its scales is.
        constexpr uint32_t kLargest = Traits::kBlockScales ? 15 : 9;
        constexpr uint32_t kGrown = Traits::kBlockScales ? kLargest - 14 : kLargest;
        float mine = LargestOf(x[0]);
#pragma unroll
        for (int q = 1; q < kQuads; ++q) mine = fmaxf(mine, LargestOf(x[q]));
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) {
          mine = fmaxf(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, step));
        }
        const uint32_t largest = __float_as_uint(mine);
        float grow = 1.0f;
        if (largest < 0x7F800000u) {
          const uint32_t exponent = max(largest >> 23, 19u);
          const float shrink = __uint_as_float((254 + kLargest - exponent) << 23);
          grow = __uint_as_float((exponent - kGrown) << 23);
#pragma unroll
          for (int q = 0; q < kQuads; ++q) {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[q][i] *= shrink;
          }
        }
        if (quad == 0) infos[c].query_factor = grow;
      } else if (quad == 0) {
        infos[c].query_factor = 1.0f;
      }
      constexpr DType kOperand = Traits::Format::kOperand;
      if constexpr (Traits::kKeyNibbles) {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          StoreNibbleQuery<Traits>(x[q], c, quad + q * kLanes, shared + Traits::kQueryOffset);
        }
      } else {
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const int lane = c % 8 * 4 + steps[q].x;
          *reinterpret_cast<uint2*>(shared + Traits::kQueryOffset +
                                    ((c / 8 * Traits::kMmaSteps + steps[q].y) * 32 + lane) * 8) =
              make_uint2(PackPair<kOperand>(x[q][0], x[q][1]),
                         PackPair<kOperand>(x[q][2], x[q][3]));
        }
      }
    }
  }
}

}  // namespace fastattn::cuda
