// The logits on any GPU from sm_80: keys are rows, heads are columns of 16-bit matrix products.
//
// e4m3 codes are fp16 values, E2M1 values times a block's scale are bf16 values: operands are
// exact. A warp keeps 16 keys in registers and goes over the heads of the group's rows, which all
// warps of the CTA share.
#pragma once

#include "common/fp4.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mqa_logits/rows.cuh"

namespace fastattn::cuda::mqa_logits {

inline constexpr int kMmaWarps = 4;
inline constexpr int kMmaKeys = 16 * kMmaWarps;
inline constexpr int kMmaChunk = 1024;  // keys of a CTA

// c += a * b, 16 x 8 x 16.
template <bool kBFloat16>
__device__ __forceinline__ void Mma16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  if constexpr (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four values of a key or query head from channel 4 * i on, as two pairs.
template <IndexerQuant kQuant>
__device__ __forceinline__ uint2 FourValues(const uint8_t* codes, const uint8_t* scales, int i) {
  float x[4];
  if constexpr (kQuant == IndexerQuant::kFp8) {
    CodesToFloat<DType::kE4M3>(*reinterpret_cast<const uint32_t*>(codes + 4 * i), x);
    return {PackPair<DType::kFloat16>(x[0], x[1]), PackPair<DType::kFloat16>(x[2], x[3])};
  } else {
    const uint32_t pairs = *reinterpret_cast<const uint16_t*>(codes + 2 * i);
    const float scale = UE8M0ToFloat(scales[4 * i / kMxBlock]);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = E2M1ToFloat(pairs >> 4 * j & 0xF) * scale;
    return {PackPair<DType::kBFloat16>(x[0], x[1]), PackPair<DType::kBFloat16>(x[2], x[3])};
  }
}

// Channels of a product are in the order in which lanes have them: lane i % 4 has a quarter of a
// key's channels, four of them a step. So have the heads in shared memory: 16 bytes a lane are two
// steps.
template <int kDim>
struct MmaHead {
  uint4 values[kDim / 32][4];  // [pair of steps][lane % 4]
  uint4 padding[4];            // keeps the heads of a product in different banks
};

template <IndexerQuant kQuant, int kDim>
__device__ __forceinline__ void LoadHeads(const LogitsParams& p, int64_t first, int heads,
                                          MmaHead<kDim>* target) {
  constexpr int kCodeBytes = kQuant == IndexerQuant::kFp8 ? kDim : kDim / 2;
  for (int i = threadIdx.x; i < heads * (kDim / 8); i += 32 * kMmaWarps) {
    const int head = i / (kDim / 8), lane = i / (kDim / 32) % 4, pair = i % (kDim / 32);
    const uint8_t* codes = p.q + (first + head) * kCodeBytes;
    const uint8_t* scales = p.q_scales + (first + head) * kLogitsScaleBytes;
    const int at = lane * (kDim / 16) + 2 * pair;  // in fours
    const uint2 a = FourValues<kQuant>(codes, scales, at);
    const uint2 b = FourValues<kQuant>(codes, scales, at + 1);
    target[head].values[pair][lane] = make_uint4(a.x, a.y, b.x, b.y);
  }
}

// Where a key's codes and scales lie; codes are null for a key of no page.
struct KeyAddress {
  const uint8_t* codes;
  const uint8_t* scales;
};

__device__ __forceinline__ KeyAddress FindKey(const LogitsParams& p, int sequence, int key) {
  if (!p.paged) {
    return {p.keys + int64_t{key} * p.CodeBytes(), p.key_scales + int64_t{key} * kLogitsScaleBytes};
  }
  const int64_t block = key / p.page_size, at = key - block * p.page_size;
  const int64_t page = p.PageOf(sequence, block);
  if (page < 0) return {nullptr, nullptr};
  const uint8_t* start = p.cache + page * p.page_stride;
  return {start + at * p.CodeBytes(), start + p.page_size * p.CodeBytes() + at * kLogitsScaleBytes};
}

template <IndexerQuant kQuant, int kDim>
__global__ void __launch_bounds__(32 * kMmaWarps)
    MmaKernel(const LogitsParams p, const LogitsGroups groups, int chunks) {
  constexpr bool kBFloat16 = kQuant == IndexerQuant::kMxfp4;
  constexpr int kSteps = kDim / 16;
  extern __shared__ __align__(16) uint8_t memory[];
  PdlWait();
  PdlLaunchDependents();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  FillHidden(p, blockIdx.x * kMmaWarps + warp, gridDim.x * kMmaWarps, lane);
  const int group = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int row = groups.FirstRow(p, group), rows = groups.RowsOf(p, group);
  const int sequence = groups.Sequence(group);
  int begin = (chunk + 1) * kMmaChunk, end = chunk * kMmaChunk;
  for (int r = 0; r < rows; ++r) {
    const VisibleKeys keys = VisibleKeysOf(p, row + r);
    if (keys.begin == keys.end) continue;
    begin = min(begin, keys.begin);
    end = max(end, keys.end);
  }
  begin = max(begin, chunk * kMmaChunk);
  end = min(end, (chunk + 1) * kMmaChunk);
  if (begin >= end) return;
  const int heads = p.num_heads;
  MmaHead<kDim>* shared_heads = reinterpret_cast<MmaHead<kDim>*>(memory);
  float* weights = reinterpret_cast<float*>(shared_heads + rows * heads);
  const int64_t first_head = int64_t{row} * heads;
  LoadHeads<kQuant, kDim>(p, first_head, rows * heads, shared_heads);
  for (int i = threadIdx.x; i < rows * heads; i += 32 * kMmaWarps) {
    weights[i] = p.weights[first_head + i];
  }
  __syncthreads();
  for (int start = begin / kMmaKeys * kMmaKeys; start < end; start += kMmaKeys) {
    uint32_t a[kSteps][4] = {};
    float scale[2] = {1.0f, 1.0f};
    bool there[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = start + 16 * warp + lane / 4 + 8 * h;
      there[h] = key >= begin && key < end;
      if (!there[h]) continue;
      const KeyAddress at = FindKey(p, sequence, key);
      there[h] = at.codes != nullptr;
      if (!there[h]) continue;
      if constexpr (!kBFloat16) scale[h] = *reinterpret_cast<const float*>(at.scales);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const uint2 x = FourValues<kQuant>(at.codes, at.scales, lane % 4 * kSteps + s);
        a[s][h] = x.x, a[s][h + 2] = x.y;
      }
    }
    for (int r = 0; r < rows; ++r) {
      float sum[2] = {};
      for (int h = 0; h < heads; h += 8) {
        const MmaHead<kDim>& head = shared_heads[r * heads + h + lane / 4];
        float c[4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; s += 2) {
          const uint4 b = head.values[s / 2][lane % 4];
          Mma16<kBFloat16>(c, a[s], b.x, b.y);
          Mma16<kBFloat16>(c, a[s + 1], b.z, b.w);
        }
        const float2 w = *reinterpret_cast<const float2*>(weights + r * heads + h + 2 * (lane % 4));
        sum[0] += Relu(c[0]) * w.x + Relu(c[1]) * w.y;
        sum[1] += Relu(c[2]) * w.x + Relu(c[3]) * w.y;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      }
      const int h = lane % 4;  // two of four lanes write a key each
      const int key = start + 16 * warp + lane / 4 + 8 * h;
      const VisibleKeys keys = VisibleKeysOf(p, row + r);
      if (h < 2 && key >= keys.begin && key < keys.end) {
        p.out[(row + r) * p.row_stride + key - keys.first] =
            (h ? there[1] : there[0]) ? (h ? sum[1] * scale[1] : sum[0] * scale[0])
                                      : -__builtin_huge_valf();
      }
      __syncwarp();
    }
  }
}

}  // namespace fastattn::cuda::mqa_logits
