// Dense latent attention of at most 16 rows (heads of new tokens) a sequence over codes, on Hopper.
//
// Keys are rows of the products and heads their columns, so that no row is padding, and operands
// are converted to fp16 in registers, once for the scores and once for the output: what shared
// memory holds are the codes as they were copied. Two CTAs of eight warps a multiprocessor; a tile
// of 64 keys is shared out three times:
//  - scores: 32 keys and a quarter of the channels a warp, added up through shared memory;
//  - softmax: one or two rows a warp, two keys a lane;
//  - output: 64 of the 512 channels a warp, all keys.
//
// Codes are exact in fp16. Each row of a quarter of the query is divided by a power of two, and a
// token's scales multiply scores and weights, not codes: the weights of a row are in units of a
// power of two for each quarter of the channels, that of the largest scale so far.

#include <new>

#include "common/dispatch.h"
#include "cuda/common/exp2.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mla/attention/finish.cuh"
#include "cuda/mla/attention/launch.h"
#include "cuda/mla/attention/narrow_shared.cuh"

namespace fastattn::cuda::mla_attention {

namespace narrow {

namespace {

// A warp's quarter of the query as right operands. In each step of 16 channels lane l has
// channels 4 * (l % 4) to 4 * (l % 4) + 3, as HalvesOf gives those of the keys.
template <class C>
struct Query {
  static constexpr int kSteps = C::kScaled ? 8 : 9;  // the last one's channels are rotated ones

  uint32_t halves[kSteps][C::kTiles][2];
  uint32_t rope[C::kTiles][2];  // kScaled: bf16, as it is
  float inverse[C::kTiles]
               [2];  // kScaled: what the scores of this lane's columns are multiplied with

  // Scores times `scale` are what is wanted: without scales of tokens the factors contain it.
  __device__ __forceinline__ void Load(const MlaAttentionParams& p, const Segment& segment,
                                       int row0, float scale, Shared<C>& shared) {
    const int lane = threadIdx.x % 32, quarter = threadIdx.x / 32 % kQuarters;
    const int first = 128 * quarter + 4 * (lane % 4), rope0 = 512 + 16 * quarter;
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
      const int row = row0 + 8 * t + lane / 4;
      const bool there = row < segment.seq.q_len * p.heads;
      const int64_t token = segment.seq.q_begin + (there ? row / p.heads : 0);
      const uint16_t* q =
          p.q + token * p.q_token_stride + (there ? row % p.heads : 0) * p.q_head_stride;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int channel = i < 8 ? first + 16 * i : rope0 + 4 * (lane % 4);
        uint2 pair = make_uint2(0, 0);
        if (there) pair = __ldg(reinterpret_cast<const uint2*>(q + channel));
        halves[i][t][0] = pair.x;
        halves[i][t][1] = pair.y;
        bits = max(bits, max(max(pair.x & 0x7FFFu, pair.x >> 16 & 0x7FFFu),
                             max(pair.y & 0x7FFFu, pair.y >> 16 & 0x7FFFu)));
      }
      if constexpr (C::kScaled) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rope[t][i] = 0;
          if (there) {
            rope[t][i] =
                __ldg(reinterpret_cast<const uint32_t*>(q + rope0 + 8 * i + 2 * (lane % 4)));
          }
        }
      }
      bits = max(bits, __shfl_xor_sync(kFullWarp, bits, 1));
      bits = max(bits, __shfl_xor_sync(kFullWarp, bits, 2));
      // The largest of the row becomes 2^14 to 2^15.
      const int exponent = min(max(static_cast<int>(bits >> 7), 15), 254) - 141;
      const float factor = PowerOfTwo(-exponent), back = PowerOfTwo(exponent);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t pair = halves[i][t][j];
          halves[i][t][j] = PackPair<kHalf>(__uint_as_float(pair << 16) * factor,
                                            __uint_as_float(pair & 0xFFFF0000u) * factor);
        }
      }
      if constexpr (C::kScaled) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          inverse[t][i] = __shfl_sync(kFullWarp, back, 4 * (2 * (lane % 4) + i));
        }
      } else if (lane % 4 == 0) {
        shared.inverse[8 * t + lane / 4][quarter] = back * scale;
      }
    }
  }
};

// Sums over a warp's quarter of the channels, of 32 keys and all rows: two tiles of 16 keys side by
// side, so that no product waits for the one before.
template <class C>
__device__ __forceinline__ void Score(const Query<C>& query, int stage, Shared<C>& shared) {
  constexpr int kHalf16 = 16 * C::kPitch;
  const int lane = threadIdx.x % 32, quarter = threadIdx.x / 32 % kQuarters;
  const int key0 = threadIdx.x / 32 / kQuarters * 32;
  const uint8_t* keys = shared.keys[stage] + key0 * C::kPitch;
  const uint32_t row = SharedAddress(keys + lane % 16 * C::kPitch);
  const uint32_t swizzle = C::Swizzle(lane % 16);
  const auto codes = [&](int i) {
    return row + 128 * quarter + i / 2 * 64 + ((i % 2 * 32 + lane / 16 * 16) ^ swizzle);
  };
  float sums[2][C::kTiles][4] = {};
  const auto add = [&](int half, int step, uint32_t low, uint32_t high) {
    const uint2 a = HalvesOf(low), b = HalvesOf(high);
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
      const uint32_t* q = query.halves[step][t];
      Mma<kHalf>(sums[half][t], a.x, b.x, a.y, b.y, q[0], q[1]);
    }
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 k[2] = {LoadMatrices(codes(i)), LoadMatrices(codes(i) + kHalf16)};
    add(0, 2 * i, k[0].x, k[0].y);
    add(1, 2 * i, k[1].x, k[1].y);
    add(0, 2 * i + 1, k[0].z, k[0].w);
    add(1, 2 * i + 1, k[1].z, k[1].w);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (C::kScaled) {
      const uint4 k = LoadMatrices(row + 528 + 32 * quarter + lane / 16 * 16 + half * kHalf16);
      const uint8_t* own = keys + (16 * half + lane / 4) * C::kPitch + 512 + 4 * quarter;
      const float scales[2] = {*reinterpret_cast<const float*>(own),
                               *reinterpret_cast<const float*>(own + 8 * C::kPitch)};
#pragma unroll
      for (int t = 0; t < C::kTiles; ++t) {
        float rotated[4] = {};
        const uint32_t* q = query.rope[t];
        Mma<DType::kBFloat16>(rotated, k.x, k.y, k.z, k.w, q[0], q[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[half][t][i];
          // Not the sum first: queries near the end of fp32's range would make it infinite.
          sum = fmaf(sum, query.inverse[t][i % 2] * scales[i / 2], rotated[i]);
        }
      }
    } else {
      const uint2 k = LoadTwoMatrices(row + 512 + (16 * quarter ^ swizzle) + half * kHalf16);
      add(half, 8, k.x, k.y);
    }
  }
  float* to = &shared.scores[quarter][2 * (lane % 4)][key0 + lane / 4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[(8 * t + i % 2) * kScorePitch + 16 * half + i / 2 * 8] = sums[half][t][i];
      }
    }
  }
}

// A row of the softmax. Weights are in units of 2^-kUnit.
template <class C>
struct Row {
  float maximum = -INFINITY;  // of the scores
  float sum = 0.0f;           // of the weights of this lane's keys
  int seen = 0;
  // Of a quarter of the channels: 1 over the power of two in units of which scales are.
  float inverse[C::kScales];

  __device__ __forceinline__ Row() {
#pragma unroll
    for (float& x : inverse) x = PowerOfTwo(C::kScaled ? 126 : 0);
  }

  // Largest scale so far: units of `scales` where a key has a weight. Multiplies `keep` with what
  // the output so far has to be multiplied with.
  __device__ __forceinline__ void Raise(const float (&weights)[2], const float (&scales)[2][4],
                                        float (&keep)[C::kScales]) {
#pragma unroll
    for (int g = 0; g < C::kScales; ++g) {
      int largest = 1;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int exponent = __float_as_int(scales[i][g]) >> 23 & 0xFF;
        // Infinite ones and NaN have no unit.
        if (weights[i] != 0.0f && exponent < 255) largest = max(largest, min(exponent, 253));
      }
      largest = __reduce_max_sync(kFullWarp, largest);
      const int before = 254 - (__float_as_int(inverse[g]) >> 23), now = max(before, largest);
      keep[g] *= PowerOfTwo(before - now);
      inverse[g] = PowerOfTwo(127 - now);
    }
  }
};

// Scores of a lane's two keys become weights. *keep: the factor of what the row has so far.
template <class C>
__device__ __forceinline__ void WeighRow(Row<C>& row, float most, float (&weights)[2],
                                         float* keep) {
  const float maximum = fmaxf(row.maximum, most);
  const float base = maximum == -INFINITY ? 0.0f : maximum;
  *keep = WeightOf(row.maximum, maximum);
  // The unit is added to a difference: a maximum less the unit is rounded, for large scores by more
  // than weights have room for.
#pragma unroll
  for (float& w : weights) w = Exp2((w - base) + kUnit);
  row.maximum = maximum;
  row.sum = row.sum * *keep + (weights[0] + weights[1]);
}

// Weights times the scales of the two keys.
template <class C>
__device__ __forceinline__ void StoreScaled(Row<C>& row, int r, const float (&scales)[2][4],
                                            const float (&weights)[2], float keep,
                                            Shared<C>& shared) {
  const int lane = threadIdx.x % 32;
  float keeps[4] = {keep, keep, keep, keep}, scaled[2][4];
  bool more = false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int g = 0; g < 4; ++g) scaled[i][g] = scales[i][g] * row.inverse[g];
    const float largest = fmaxf(fmaxf(fabsf(scaled[i][0]), fabsf(scaled[i][1])),
                                fmaxf(fabsf(scaled[i][2]), fabsf(scaled[i][3])));
    more = more || (largest >= 2.0f && weights[i] != 0.0f);
  }
  if (__any_sync(kFullWarp, more)) {
    row.Raise(weights, scales, keeps);
#pragma unroll
    for (int i = 0; i < 8; ++i) scaled[i / 4][i % 4] = scales[i / 4][i % 4] * row.inverse[i % 4];
  }
  // A key without a weight, seen or not, may have a scale that is infinite in units of the others.
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (weights[i / 4] == 0.0f) scaled[i / 4][i % 4] = 0.0f;
  }
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    *reinterpret_cast<uint32_t*>(&shared.weights[g][r][2 * lane]) =
        PackPair<kHalf>(weights[0] * scaled[0][g], weights[1] * scaled[1][g]);
  }
  if (lane == 0) {
    *reinterpret_cast<float4*>(shared.keep[r]) =
        make_float4(keeps[0], keeps[1], keeps[2], keeps[3]);
  }
}

// The rows of a warp, two keys a lane.
template <class C>
__device__ __forceinline__ void Weigh(int key0, int stage, float scale, Row<C> (&rows)[C::kTiles],
                                      Shared<C>& shared) {
  const int lane = threadIdx.x % 32, row0 = C::kTiles * (threadIdx.x / 32);
  const uint16_t assigned = *reinterpret_cast<uint16_t*>(&shared.assigned[stage][2 * lane]);
  float weights[C::kTiles][2], most[C::kTiles], keep[C::kTiles];
#pragma unroll
  for (int t = 0; t < C::kTiles; ++t) {
    float2 x[kQuarters];
#pragma unroll
    for (int g = 0; g < kQuarters; ++g) {
      x[g] = *reinterpret_cast<const float2*>(&shared.scores[g][row0 + t][2 * lane]);
    }
    float (&w)[2] = weights[t];
    if constexpr (C::kScaled) {
      w[0] = ((x[0].x + x[1].x) + (x[2].x + x[3].x)) * scale;
      w[1] = ((x[0].y + x[1].y) + (x[2].y + x[3].y)) * scale;
    } else {
      const float4 f = *reinterpret_cast<const float4*>(shared.inverse[row0 + t]);
      w[0] = fmaf(x[0].x, f.x, x[1].x * f.y) + fmaf(x[2].x, f.z, x[3].x * f.w);
      w[1] = fmaf(x[0].y, f.x, x[1].y * f.y) + fmaf(x[2].y, f.z, x[3].y * f.w);
    }
    const int seen = rows[t].seen - key0;
    if ((assigned & 0xFF) == 0 || 2 * lane >= seen) w[0] = -INFINITY;
    if ((assigned & 0xFF00) == 0 || 2 * lane + 1 >= seen) w[1] = -INFINITY;
    most[t] = fmaxf(w[0], w[1]);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
      most[t] = fmaxf(most[t], __shfl_xor_sync(kFullWarp, most[t], step));
    }
  }
#pragma unroll
  for (int t = 0; t < C::kTiles; ++t) WeighRow(rows[t], most[t], weights[t], &keep[t]);
  if constexpr (C::kScaled) {
    float scales[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 own =
          *reinterpret_cast<const float4*>(shared.keys[stage] + (2 * lane + i) * C::kPitch + 512);
      scales[i][0] = own.x;
      scales[i][1] = own.y;
      scales[i][2] = own.z;
      scales[i][3] = own.w;
    }
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
      StoreScaled(rows[t], row0 + t, scales, weights[t], keep[t], shared);
    }
  } else {
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
      *reinterpret_cast<uint32_t*>(&shared.weights[0][row0 + t][2 * lane]) =
          PackPair<kHalf>(weights[t][0], weights[t][1]);
      if (lane == 0) shared.keep[row0 + t][0] = keep[t];
    }
  }
}

// Codes of keys that not all rows see: as values they would spoil a product with a weight of 0.
template <class C>
__device__ __forceinline__ void ScrubKeys(int first, uint8_t* keys) {
#pragma unroll 1
  for (int i = 128 * max(first, 0) + threadIdx.x; i < 128 * kTileKeys; i += kThreads) {
    uint32_t* codes = reinterpret_cast<uint32_t*>(keys + i / 128 * C::kPitch) + i % 128;
    *codes &= ~__vcmpeq4(*codes & 0x7F7F7F7Fu, 0x7F7F7F7Fu);
  }
}

// Channels 64 * warp on. In each tile of 16 channels the even ones are the first eight rows.
template <class C>
__device__ __forceinline__ void AddValues(int stage, const Shared<C>& shared,
                                          float (&out)[4][C::kTiles][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int quarter = C::kScaled ? warp / 2 : 0;
  float keep[C::kTiles][2];
  bool same = true;
#pragma unroll
  for (int t = 0; t < C::kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      keep[t][i] = shared.keep[8 * t + 2 * (lane % 4) + i][quarter];
      same = same && keep[t][i] == 1.0f;
    }
  }
  if (!__all_sync(kFullWarp, same)) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int t = 0; t < C::kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[c][t][i] *= keep[t][i % 2];
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 weights[C::kTiles];
#pragma unroll
    for (int t = 0; t < C::kTiles; ++t) {
      weights[t] = LoadMatrices(
          SharedAddress(&shared.weights[quarter][8 * t + lane % 8][32 * half + lane / 8 * 8]));
    }
    const uint32_t values =
        SharedAddress(shared.keys[stage] + (32 * half + lane) * C::kPitch + 64 * warp);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 v = LoadMatricesTransposed(values + (16 * c ^ C::Swizzle(lane)));
      // Of two keys each: codes of an even channel, codes of an odd one.
      const uint2 a = HalvesOf(__byte_perm(v.x, 0, 0x3120));
      const uint2 b = HalvesOf(__byte_perm(v.y, 0, 0x3120));
#pragma unroll
      for (int t = 0; t < C::kTiles; ++t) {
        Mma<kHalf>(out[c][t], a.x, a.y, b.x, b.y, weights[t].x, weights[t].y);
      }
      const uint2 d = HalvesOf(__byte_perm(v.z, 0, 0x3120));
      const uint2 e = HalvesOf(__byte_perm(v.w, 0, 0x3120));
#pragma unroll
      for (int t = 0; t < C::kTiles; ++t) {
        Mma<kHalf>(out[c][t], d.x, d.y, e.x, e.y, weights[t].z, weights[t].w);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void Store(const MlaAttentionParams& p, const Segment& segment, int row0,
                                      bool whole, float* partial,
                                      const float (&out)[4][C::kTiles][4],
                                      const Shared<C>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 2 * C::kTiles; ++i) {
    const int r = i / 2 * 8 + 2 * (lane % 4) + i % 2, row = row0 + r;
    if (row >= segment.seq.q_len * p.heads) continue;
    const float factor = shared.factor[r][C::kScaled ? warp / 2 : 0];
    const int64_t at = int64_t{segment.seq.q_begin} * p.heads + row;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      // A row without a key has no output, not 0 times one that is NaN.
      const float a = factor == 0.0f ? 0.0f : out[c][i / 2][i % 2] * factor;
      const float b = factor == 0.0f ? 0.0f : out[c][i / 2][2 + i % 2] * factor;
      const int channel = 64 * warp + 16 * c + 2 * (lane / 4);
      if (whole && p.out_float == nullptr) {
        *reinterpret_cast<uint32_t*>(p.out + at * kMlaAttentionChannels + channel) =
            PackPair<DType::kBFloat16>(a, b);
      } else {
        float* row_out =
            whole ? p.out_float + at * kMlaAttentionChannels : partial + r * kMlaAttentionChannels;
        *reinterpret_cast<float2*>(row_out + channel) = make_float2(a, b);
      }
    }
  }
}

// LSEs, and the factors of the outputs.
template <class C>
__device__ __forceinline__ void Finish(const MlaAttentionParams& p, const Segment& segment,
                                       int row0, bool whole, float static_scale, float* lse,
                                       Row<C> (&rows)[C::kTiles], Shared<C>& shared) {
#pragma unroll
  for (int t = 0; t < C::kTiles; ++t) {
    float sum = rows[t].sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    const int r = C::kTiles * (threadIdx.x / 32) + t, row = row0 + r;
    if (threadIdx.x % 32 != 0 || row >= segment.seq.q_len * p.heads) continue;
    constexpr float kOne = 0x1p-13f;  // weights, and outputs with them, are in units of it
    static_assert(kUnit == 13.0f);
    float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (whole) {
      const int head = row % p.heads;
      const Normaliser end = FinishRow(p, rows[t].maximum, sum * kOne, head);
      factor = end.factor * kOne;
      StoreLse(p, segment.seq.q_begin + row / p.heads, head, end.lse);
    } else {
      lse[r] = sum == 0.0f ? -INFINITY : rows[t].maximum + log2f(sum * kOne);
    }
#pragma unroll
    for (int g = 0; g < C::kScales; ++g) {
      // The unit; 1 without scales.
      const float unit = __int_as_float((254 << 23) - __float_as_int(rows[t].inverse[g]));
      // Whatever the scale is, a row without a key has no output.
      shared.factor[r][g] = factor == 0.0f ? 0.0f : factor * (unit * static_scale);
    }
  }
}

template <class C>
__device__ __forceinline__ void RunSegment(const MlaAttentionParams& p,
                                           const MlaAttentionPlan& plan, float static_scale,
                                           Copier<C>& copier, Shared<C>& shared) {
  const Segment& segment = shared.segment;
  const int row0 = static_cast<int>(segment.row), batch_idx = segment.batch_idx;
  const int row_count = segment.seq.q_len * p.heads, limit = segment.seq.k_limit;
  if (row0 >= row_count) return;
  const int least = VisibleKeys(p, segment.seq, row0 / p.heads);
  const int begin = segment.begin;
  const int end = min(segment.end, TilesBefore(p, segment.seq, row0 + C::kRows));
  copier.Begin();
  copier.Look(batch_idx, limit, begin);
  if (begin < end) copier.Copy(0);
  CommitCopies();
  copier.Look(batch_idx, limit, begin + 1);
  const float scale = p.softmax_scale * kLog2E * static_scale;
  Query<C> query;
  query.Load(p, segment, row0, scale, shared);
  Row<C> rows[C::kTiles];
#pragma unroll
  for (int t = 0; t < C::kTiles; ++t) {
    const int row = row0 + C::kTiles * (threadIdx.x / 32) + t;
    if (row < row_count) rows[t].seen = VisibleKeys(p, segment.seq, row / p.heads);
  }
  float out[4][C::kTiles][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile, stage ^= 1) {
    WaitForCopies<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before
    if (tile + 1 < end) copier.Copy(stage ^ 1);
    CommitCopies();
    copier.Look(batch_idx, limit, tile + 2);
    Score(query, stage, shared);
    __syncthreads();
    const int key0 = tile * kTileKeys;
    if (key0 + kTileKeys > least) ScrubKeys<C>(least - key0, shared.keys[stage]);
    Weigh(key0, stage, scale, rows, shared);
    __syncthreads();
    AddValues(stage, shared, out);
  }
  const bool whole = segment.begin == 0 && segment.end == segment.tiles;
  const int64_t slot = PartialSlot(blockIdx.x, segment.begin > 0);
  const Workspace workspace = WorkspaceOf(p, plan);
  Finish(p, segment, row0, whole, static_scale, workspace.lse + slot * C::kRows, rows, shared);
  __syncthreads();
  Store<C>(p, segment, row0, whole, workspace.partial + slot * C::kRows * kMlaAttentionChannels,
           out, shared);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 2)
    NarrowKernel(const __grid_constant__ MlaAttentionParams p,
                 const __grid_constant__ MlaAttentionPlan plan,
                 const __grid_constant__ Divisor page_size) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) uint8_t memory[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
  PdlWait();
  PdlLaunchDependents();
  FindShare<kThreads>(p, plan, blockIdx.x, shared.sums, &shared.share);
  __syncthreads();
  const float static_scale = C::kScaled ? 1.0f : __ldg(p.scale);
  Copier<C> copier(p, page_size, shared);
  // One thread walks: what it has to remember would cost all of them registers.
  using Walk = Walker<true>;
  Walk* walker = reinterpret_cast<Walk*>(shared.walker);
  if (threadIdx.x == 0) new (walker) Walk(p, plan, shared.share, blockIdx.x);
  bool noted = false;  // of thread 0
  while (true) {
    __syncthreads();  // nobody reads what the segment before left in shared memory
    if (threadIdx.x == 0) {
      shared.more = walker->Next(&shared.segment);
      const Segment& segment = shared.segment;
      if (shared.more && segment.merged > 0) {
        WriteNote(WorkspaceOf(p, plan), blockIdx.x,
                  {segment.merged, segment.seq.q_begin, static_cast<int>(segment.row),
                   segment.seq.q_len * p.heads});
        noted = true;
      }
    }
    __syncthreads();
    if (!shared.more) break;
    RunSegment<C>(p, plan, static_scale, copier, shared);
  }
  if (threadIdx.x == 0 && !noted) WriteNote(WorkspaceOf(p, plan), blockIdx.x, {});
#else
  __trap();  // launched on Hopper only
#endif
}

template <MlaFormat kFormat, int kTiles>
cudaError_t LaunchRows(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                       cudaStream_t stream) {
  using C = Config<kFormat, kTiles>;
  static_assert(2 * (sizeof(Shared<C>) + 1024) <= 228 * 1024);
  DeviceFacts facts;
  const cudaError_t status = AllowShared<NarrowKernel<C>>(sizeof(Shared<C>), &facts);
  if (status != cudaSuccess) return status;
  return LaunchPdlWithShared(NarrowKernel<C>, dim3(plan.groups), dim3(kThreads), sizeof(Shared<C>),
                             stream, p, plan, Divisor(static_cast<uint32_t>(p.cache.page_size)));
}

}  // namespace

}  // namespace narrow

cudaError_t LaunchNarrow(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                         cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  dispatch<MlaFormat::kFp8, MlaFormat::kFp8x656>(p.cache.format, "cache_format", [&](auto format) {
    constexpr MlaFormat kFormat = decltype(format)::value;
    status = plan.tile_rows == 8 ? narrow::LaunchRows<kFormat, 1>(p, plan, stream)
                                 : narrow::LaunchRows<kFormat, 2>(p, plan, stream);
  });
  return status;
}

}  // namespace fastattn::cuda::mla_attention
