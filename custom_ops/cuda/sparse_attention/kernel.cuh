// Attention of chosen keys in fp32, on every GPU and over every cache.
//
// A CTA takes one query token and up to 8 query heads of one KV head, which share each key that is
// read. Its warps take the tiles of the query's keys in turn (columns.cuh), each with an online
// softmax of its own, and add up their outputs at the end. So the bits of a query depend on its own
// keys alone.
//
// Scores: a lane reads the K of its column, 16 bytes at a time, and multiplies it by the queries in
// shared memory. Outputs: a lane has channels 2 * (lane + 32 * i) and the next one, and reads 16
// tokens of them at once in a wide unit. What a column does not see is not read, or is masked as
// codes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/head_dims.h"
#include "common/normaliser.h"
#include "common/static_scales.h"
#include "cuda/attention/shared/scales.cuh"
#include "cuda/attention/shared/seq_lengths.cuh"
#include "cuda/common/any_dtype.cuh"
#include "cuda/common/exp2.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/softcap.cuh"
#include "cuda/sparse_attention/codes.cuh"
#include "cuda/sparse_attention/columns.cuh"
#include "cuda/sparse_attention/launch.h"
#include "formats/kv_format.h"

namespace fastattn::cuda::sparse {

inline constexpr int kHeads = 8;  // of a CTA, at most

template <DType kCode_, DType kValue_, Scales kScales_, int kMaxDim_>
struct Traits {
  using Side = SideFormat<kCode_, kScales_>;
  static constexpr DType kCode = kCode_;    // of K
  static constexpr DType kValue = kValue_;  // of V
  static constexpr int kMaxDim = kMaxDim_;
  static constexpr int kPairs = kMaxDim / 64;  // of channels, of a lane
  static constexpr bool kQuantized = Side::kQuantized;
  // A thread's outputs, and V of 16 bits as it is loaded, need registers.
  static constexpr int kWarps = kMaxDim > 128 ? 8 : kQuantized ? 16 : 12;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr bool kNibbles = Side::kNibbles;
  static constexpr bool kValueNibbles = SideFormat<kValue, kScales_>::kNibbles;
  static constexpr bool kGrouped = Side::kGrouped;
  static constexpr int kGroup = kGrouped ? Side::kGroup : 32;    // channels of a scale
  static constexpr int kPieceValues = 128 / InfoOf(kCode).bits;  // channels of 16 bytes
  static_assert(kGroup % kPieceValues == 0, "the channels of 16 bytes have one scale");
  using Storage = typename Element<kCode>::Storage;
};

// A warp's columns, for lanes that read V of all of them.
struct WarpColumns {
  int64_t values[32];  // where V of the column's block and, unless the unit is wide, token begins
  int64_t scales[32];  // where the token's scales begin, if groups of channels have some
  alignas(16) float weights[kHeads][32];
};

template <class T>
struct Shared {
  alignas(16) float queries[kHeads][T::kMaxDim];
  float factors[kHeads];  // of the products of a head, for scores in units of log2
  union {
    WarpColumns columns[T::kWarps];
    float outputs[T::kWarps][T::kMaxDim];
  };
  float maxima[T::kWarps][kHeads];
  float sums[T::kWarps][kHeads];
  int batch_idx;
};

// A query token with some heads of a KV head.
struct Work {
  int token;
  int kv_head;
  int first_head;  // query head
  int heads;
  int batch_idx;
  int position;
};

// The outputs of a warp over the keys that it has seen.
template <class T>
struct Rows {
  float acc[kHeads][2 * T::kPairs];
  float maximum[kHeads];  // the same in all lanes
  float sum[kHeads];      // of the lane's columns
};

template <class T>
__device__ __forceinline__ void LoadQueries(const AttentionParams& a, const Work& work,
                                            Shared<T>* shared) {
  const PagedCache& cache = a.cache;
  const bool static_scales = T::kQuantized && !IsDynamic(cache.type);
  const bool by_channel = static_scales && cache.k_granularity == ScaleScheme::kChannel;
  for (int i = threadIdx.x; i < work.heads * a.head_dim; i += T::kThreads) {
    const int h = i / a.head_dim, d = i % a.head_dim;
    const int64_t at = work.token * a.q_token_stride + (work.first_head + h) * a.q_head_stride;
    float x = LoadAny(a.q, a.q_dtype, at + d);
    if (by_channel) {
      x *= LoadScale(cache.k_scales, cache.scale_dtype,
                     ChannelScaleIndex<int64_t>(work.kv_head, d, a.head_dim));
    }
    shared->queries[h][d] = x;
  }
  if (static_cast<int>(threadIdx.x) < work.heads) {
    const DescaleAt at = {work.batch_idx, work.first_head + static_cast<int>(threadIdx.x)};
    float factor = a.softmax_scale * kLog2E;
    if (static_scales && !by_channel) {
      factor *= LoadHeadScale(cache, cache.k_scales, cache.k_granularity, work.kv_head);
    }
    shared->factors[threadIdx.x] = TimesDescale(factor, a.q_descale, work.token, work.kv_head, at);
  }
}

// Adds the products of the K in some words with each head's query from channel `d` on.
template <class T>
__device__ __forceinline__ void AddProducts(const float (&x)[4], int d, int heads,
                                            const Shared<T>& shared, float (&dots)[kHeads]) {
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads) break;
    const float4 q = *reinterpret_cast<const float4*>(&shared.queries[h][d]);
    dots[h] = fmaf(q.x, x[0], dots[h]);
    dots[h] = fmaf(q.y, x[1], dots[h]);
    dots[h] = fmaf(q.z, x[2], dots[h]);
    dots[h] = fmaf(q.w, x[3], dots[h]);
  }
}

// A lane multiplies the K of its column by the queries.
template <class T>
__device__ __forceinline__ void Multiply(const AttentionParams& a, const Work& work,
                                         const Column& column, const Shared<T>& shared,
                                         float (&dots)[kHeads]) {
  const PagedCache& cache = a.cache;
  const auto* key = static_cast<const typename T::Storage*>(cache.key) +
                    cache.key_strides.Row(column.block, work.kv_head, column.row);
  const auto* scales = static_cast<const uint8_t*>(cache.k_scales);
  if constexpr (T::kGrouped) {
    scales += cache.k_scale_strides.Plane(column.block, work.kv_head) +
              column.row * (a.head_dim / T::kGroup);
  }
#pragma unroll 4
  for (int piece = 0; piece < a.head_dim / T::kPieceValues; ++piece) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(key) + piece);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    const int first = piece * T::kPieceValues;
    float x[4];
    if constexpr (!T::kQuantized) {
#pragma unroll
      for (int w = 0; w < 4; w += 2) {
        PairToFloat<T::kCode>(words[w], &x[0], &x[1]);
        PairToFloat<T::kCode>(words[w + 1], &x[2], &x[3]);
        AddProducts(x, first + 2 * w, work.heads, shared, dots);
      }
    } else if constexpr (!T::kNibbles) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        Quad<T::kCode>::ToFloat(words[w], x);
        AddProducts(x, first + 4 * w, work.heads, shared, dots);
      }
    } else {
      float scale = 1.0f;
      if constexpr (T::kGrouped) {
        scale = GroupScaleOf<T::Side::kScaleType>::Value(__ldg(scales + first / T::kGroup));
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float even[4], odd[4];
        Quad<T::kCode>::ToFloat(words[w] & 0x0F0F0F0Fu, even);
        Quad<T::kCode>::ToFloat(words[w] >> 4 & 0x0F0F0F0Fu, odd);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float both[4] = {even[2 * half], odd[2 * half], even[2 * half + 1],
                                 odd[2 * half + 1]};
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = T::kGrouped ? both[i] * scale : both[i];
          AddProducts(x, first + 8 * w + 4 * half, work.heads, shared, dots);
        }
      }
    }
  }
}

// Scores of a tile, and from them the weights of its columns. What the warp has is rescaled.
template <class T>
__device__ __forceinline__ void Weigh(const AttentionParams& a, const Work& work,
                                      const Column& column, const Shared<T>& shared,
                                      WarpColumns* columns, Rows<T>* rows) {
  constexpr float kInf = __builtin_huge_valf();
  const PagedCache& cache = a.cache;
  const int lane = threadIdx.x % 32;
  float dots[kHeads] = {};
  float key_scale = 1.0f, value_scale = 1.0f;
  if (column.seen) {
    Multiply(a, work, column, shared, dots);
    if (!T::kGrouped && cache.k_granularity == ScaleScheme::kToken) {
      const int64_t k = cache.k_scale_strides.Plane(column.block, work.kv_head) + column.row;
      const int64_t v = cache.v_scale_strides.Plane(column.block, work.kv_head) + column.row;
      key_scale = LoadScale(cache.k_scales, cache.scale_dtype, k);
      value_scale = LoadScale(cache.v_scales, cache.scale_dtype, v);
    }
  }
  const ScoreCap cap(a.softcap);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= work.heads) break;
    float score = dots[h] * key_scale * shared.factors[h];
    if (a.softcap > 0.0f) score = cap(score);
    float largest = column.seen ? score : -kInf;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {  // not a NaN
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
    }
    const float before = rows->maximum[h], maximum = fmaxf(before, largest);
    const float keep = WeightOf(before, maximum);
    const float weight = column.seen ? Exp2(score - (maximum == -kInf ? 0.0f : maximum)) : 0.0f;
    rows->maximum[h] = maximum;
    rows->sum[h] = rows->sum[h] * keep + weight;
#pragma unroll
    for (int i = 0; i < 2 * T::kPairs; ++i) rows->acc[h][i] *= keep;
    columns->weights[h][lane] = column.seen ? weight * value_scale : 0.0f;
  }
}

// V of 16 columns and one pair of channels, as it is stored.
template <class T>
struct Values {
  uint32_t even[T::kQuantized ? 4 : 16];  // nibbles and 16-bit values: both channels
  uint32_t odd[T::kQuantized && !T::kValueNibbles ? 4 : 1];
};

// `seen`: a bit for each of the unit's columns.
__device__ __forceinline__ void LoadPlane(const uint8_t* from, const int64_t* offsets, bool wide,
                                          uint32_t seen, uint32_t (&words)[4]) {
  if (wide) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from + offsets[0]));
    words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] &= ByteMask(seen >> (4 * w));
    return;
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((seen >> (4 * w + i) & 1) == 0) continue;
      words[w] |= static_cast<uint32_t>(__ldg(from + offsets[4 * w + i])) << (8 * i);
    }
  }
}

template <class T>
__device__ __forceinline__ Values<T> LoadValues(const PagedCache& cache, const int64_t* offsets,
                                                bool wide, uint32_t seen, int pair) {
  Values<T> values;
  if constexpr (!T::kQuantized) {
    const auto* value = static_cast<const uint16_t*>(cache.value);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      values.even[i] = 0;
      if ((seen >> i & 1) == 0) continue;
      values.even[i] = __ldg(reinterpret_cast<const uint32_t*>(value + offsets[i]) + pair);
    }
  } else {
    const auto* value = static_cast<const uint8_t*>(cache.value);
    const int64_t stride = cache.value_strides.row;
    const int row = T::kValueNibbles ? pair : 2 * pair;
    LoadPlane(value + row * stride, offsets, wide, seen, values.even);
    if constexpr (!T::kValueNibbles) {
      LoadPlane(value + (row + 1) * stride, offsets, wide, seen, values.odd);
    }
  }
  return values;
}

// Four columns of a pair of channels as fp32.
template <class T>
__device__ __forceinline__ void Widen(const Values<T>& values, int quad, float (&even)[4],
                                      float (&odd)[4]) {
  if constexpr (!T::kQuantized) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      PairToFloat<T::kValue>(values.even[4 * quad + i], &even[i], &odd[i]);
    }
  } else if constexpr (T::kValueNibbles) {
    Quad<T::kValue>::ToFloat(values.even[quad] & 0x0F0F0F0Fu, even);
    Quad<T::kValue>::ToFloat(values.even[quad] >> 4 & 0x0F0F0F0Fu, odd);
  } else {
    Quad<T::kValue>::ToFloat(values.even[quad], even);
    Quad<T::kValue>::ToFloat(values.odd[quad], odd);
  }
}

// Adds the V of a unit's columns, by their weights, to the lane's channels.
template <class T>
__device__ __forceinline__ void AddValues(const AttentionParams& a, const Work& work,
                                          const WarpColumns& columns, int unit, bool wide,
                                          uint32_t seen, Rows<T>* rows) {
  const PagedCache& cache = a.cache;
  const int lane = threadIdx.x % 32, pairs = cache.ValueDim() / 2;
#pragma unroll
  for (int i = 0; i < T::kPairs; ++i) {
    const int pair = lane + 32 * i;
    if (pair >= pairs) break;
    const Values<T> values = LoadValues<T>(cache, columns.values + unit * kUnit, wide, seen, pair);
#pragma unroll
    for (int quad = 0; quad < kUnit / 4; ++quad) {
      const int column = unit * kUnit + 4 * quad;
      float even[4], odd[4];
      Widen(values, quad, even, odd);
      if constexpr (T::kGrouped) {
        const auto* scales = static_cast<const uint8_t*>(cache.v_scales) + 2 * pair / T::kGroup;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float scale = 0.0f;
          if (seen >> (4 * quad + j) & 1) {
            scale = GroupScaleOf<T::Side::kScaleType>::Value(
                __ldg(scales + columns.scales[column + j]));
          }
          even[j] *= scale;
          odd[j] *= scale;
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= work.heads) break;
        const float4 weight = *reinterpret_cast<const float4*>(&columns.weights[h][column]);
        const float weights[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          rows->acc[h][2 * i] = fmaf(weights[j], even[j], rows->acc[h][2 * i]);
          rows->acc[h][2 * i + 1] = fmaf(weights[j], odd[j], rows->acc[h][2 * i + 1]);
        }
      }
    }
  }
}

// Where V and its scales of a column begin.
template <class T>
__device__ __forceinline__ void PlaceValues(const PagedCache& cache, int kv_head,
                                            const Column& column, WarpColumns* columns) {
  if (column.block < 0) return;
  const int lane = threadIdx.x % 32;
  const int64_t plane = cache.value_strides.Plane(column.block, kv_head);
  columns->values[lane] =
      T::kQuantized ? plane + TokenSlot(column.row) : plane + column.row * cache.value_strides.row;
  if constexpr (T::kGrouped) {
    const int64_t scales = cache.v_scale_strides.Plane(column.block, kv_head);
    columns->scales[lane] = scales + column.row * (cache.ValueDim() / T::kGroup);
  }
}

// The warp's tiles of the query's keys.
template <class T>
__device__ __forceinline__ void Attend(const SparseAttentionParams& p, const Work& work,
                                       Shared<T>* shared, Rows<T>* rows) {
  const AttentionParams& a = p.attention;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpColumns* columns = &shared->columns[warp];
  const UnitRange range(p, work.token, work.kv_head, work.position);
  for (int tile = warp; 2 * tile < range.units; tile += T::kWarps) {
    const Column column = range.Find(p, work.batch_idx, 2 * tile + lane / kUnit, lane % kUnit);
    const uint32_t seen = __ballot_sync(kFullWarp, column.seen);
    if (seen == 0) continue;
    const uint32_t wide = __ballot_sync(kFullWarp, column.wide);
    PlaceValues<T>(a.cache, work.kv_head, column, columns);
    Weigh(a, work, column, *shared, columns, rows);
    __syncwarp();
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const uint32_t own = seen >> (kUnit * unit) & 0xFFFFu;
      if (own == 0) continue;
      AddValues(a, work, *columns, unit, (wide >> (kUnit * unit) & 1) != 0, own, rows);
    }
    __syncwarp();  // before the next tile's columns take their place
  }
}

// The sequence and the position of a token; false if it belongs to none. All threads take part.
template <class T>
__device__ __forceinline__ bool FindSeq(const AttentionParams& a, Shared<T>* shared, Work* work) {
  constexpr int kNone = 0x7FFFFFFF;
  if (threadIdx.x == 0) shared->batch_idx = kNone;
  __syncthreads();
  for (int b = threadIdx.x; b < a.seqs.batch; b += T::kThreads) {
    const SeqShape seq = LoadSeqShape(a, b);
    if (work->token >= seq.q_begin && work->token < seq.q_begin + seq.q_len) {
      atomicMin(&shared->batch_idx, b);
    }
  }
  __syncthreads();
  if (shared->batch_idx == kNone) return false;
  work->batch_idx = shared->batch_idx;
  const SeqShape seq = LoadSeqShape(a, work->batch_idx);
  work->position = seq.k_len - seq.q_len + (work->token - seq.q_begin);
  return true;
}

// Output and LSE of a token of no sequence.
template <class T>
__device__ __forceinline__ void Clear(const AttentionParams& a, const Work& work) {
  const int dim = a.cache.ValueDim();
  const int64_t first = (static_cast<int64_t>(work.token) * a.num_heads + work.first_head) * dim;
  for (int i = threadIdx.x; a.clear_padding && i < work.heads * dim; i += T::kThreads) {
    StoreAny(0.0f, a.out_dtype, a.out, first + i);
  }
  if (a.lse != nullptr && static_cast<int>(threadIdx.x) < work.heads) {
    const int64_t head = work.first_head + static_cast<int>(threadIdx.x);
    a.lse[head * a.seqs.num_tokens + work.token] = -__builtin_huge_valf();
  }
}

// Adds up the warps' outputs, always in the same order.
template <class T>
__device__ __forceinline__ void Finish(const AttentionParams& a, const Work& work,
                                       Shared<T>* shared, Rows<T>* rows) {
  const PagedCache& cache = a.cache;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = cache.ValueDim();
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= work.heads) break;
    const float sum = SumOfWarp(rows->sum[h]);
    if (lane == 0) {
      shared->maxima[warp][h] = rows->maximum[h];
      shared->sums[warp][h] = sum;
    }
  }
  const bool static_scales = T::kQuantized && !IsDynamic(cache.type);
  const bool by_channel = static_scales && cache.v_granularity == ScaleScheme::kChannel;
  float scale = a.out_scale == nullptr ? 1.0f : 1.0f / *a.out_scale;
  if (static_scales && !by_channel) {
    scale *= LoadHeadScale(cache, cache.v_scales, cache.v_granularity, work.kv_head);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= work.heads) break;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2 * T::kPairs; ++i) {
      const int channel = 2 * (lane + 32 * (i / 2)) + i % 2;
      if (channel < dim) shared->outputs[warp][channel] = rows->acc[h][i];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= dim) continue;
    float maximum = shared->maxima[0][h];
    for (int w = 1; w < T::kWarps; ++w) maximum = fmaxf(maximum, shared->maxima[w][h]);
    float sum = 0.0f, acc = 0.0f;
    for (int w = 0; w < T::kWarps; ++w) {
      const float weight = WeightOf(shared->maxima[w][h], maximum);
      sum = fmaf(shared->sums[w][h], weight, sum);
      acc = fmaf(shared->outputs[w][threadIdx.x], weight, acc);
    }
    const int head = work.first_head + h;
    const bool empty = sum == 0.0f;
    const Normaliser found = NormaliserOf<0>(
        empty, maximum, sum, a.sinks, [&] { return LoadScale(a.sinks, a.sinks_dtype, head); });
    float x = acc * found.factor * scale;
    if (by_channel) {
      x *= LoadScale(cache.v_scales, cache.scale_dtype,
                     ChannelScaleIndex<int64_t>(work.kv_head, threadIdx.x, dim));
    }
    const int64_t row = static_cast<int64_t>(work.token) * a.num_heads + head;
    StoreAny(empty ? 0.0f : x, a.out_dtype, a.out, row * dim + threadIdx.x);
    if (a.lse != nullptr && threadIdx.x == 0) {
      a.lse[static_cast<int64_t>(head) * a.seqs.num_tokens + work.token] = found.lse;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    SparseKernel(const __grid_constant__ SparseAttentionParams p) {
  __shared__ Shared<T> shared;
  const AttentionParams& a = p.attention;
  PdlWait();
  PdlLaunchDependents();
  const int group = a.num_heads / a.num_kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int part = blockIdx.x % parts, rest = blockIdx.x / parts;
  Work work;
  work.kv_head = rest % a.num_kv_heads;
  work.token = rest / a.num_kv_heads;
  work.first_head = work.kv_head * group + part * kHeads;
  work.heads = min(group - part * kHeads, kHeads);
  if (!FindSeq(a, &shared, &work)) {
    Clear<T>(a, work);
    return;
  }
  LoadQueries(a, work, &shared);
  Rows<T> rows;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    rows.maximum[h] = -__builtin_huge_valf();
    rows.sum[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * T::kPairs; ++i) rows.acc[h][i] = 0.0f;
  }
  __syncthreads();
  Attend(p, work, &shared, &rows);
  Finish(a, work, &shared, &rows);
}

template <class T>
cudaError_t Launch(const SparseAttentionParams& p, cudaStream_t stream) {
  const AttentionParams& a = p.attention;
  const int group = a.num_heads / a.num_kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int64_t ctas = static_cast<int64_t>(a.seqs.num_tokens) * a.num_kv_heads * parts;
  return LaunchPdl(SparseKernel<T>, dim3(GridSize(ctas)), dim3(T::kThreads), stream, p);
}

}  // namespace fastattn::cuda::sparse

namespace fastattn::cuda {

template <DType kCode, DType kValue, Scales kScales>
cudaError_t LaunchSparseVariant(const SparseAttentionParams& p, cudaStream_t stream) {
  if (p.attention.head_dim <= 128) {
    return sparse::Launch<sparse::Traits<kCode, kValue, kScales, 128>>(p, stream);
  }
  return sparse::Launch<sparse::Traits<kCode, kValue, kScales, 256>>(p, stream);
}

}  // namespace fastattn::cuda
