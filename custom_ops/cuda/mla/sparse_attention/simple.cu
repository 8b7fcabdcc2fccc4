// Sparse latent attention without tensor cores, in fp32: what runs where no faster kernel applies.
//
// A CTA takes one query token and 8 heads, a warp each. The warps dequantise a tile of tokens into
// shared memory together; a tile's skipped tokens are zeros there, and their memory is not read. A
// warp then scores the tile for its head, and keeps the head's output in registers.
#include "cuda/mla/sparse_attention/simple.h"

#include <cstdint>

#include "common/fp4.h"
#include "common/normaliser.h"
#include "common/numeric.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kWarps = 8;  // of a CTA: heads
constexpr int kThreads = 32 * kWarps;
constexpr int kTileKeys = 16;
constexpr int kMaxDim = 576;
constexpr int kLaneDims = kMaxDim / 32;         // channels lane + 32 * i of a query
constexpr int kLaneValues = kMlaValueDim / 32;  // and of an output

struct Tile {
  float keys[kTileKeys][kMaxDim];
  bool there[kTileKeys];
};

// What a selection's division by the page size needs.
struct PageSizes {
  Divisor keys;
  Divisor extra;
};

__device__ __forceinline__ void StoreBf16(uint32_t pair, float* out) {
  out[0] = BFloat16ToFloat(static_cast<uint16_t>(pair));
  out[1] = BFloat16ToFloat(static_cast<uint16_t>(pair >> 16));
}

__device__ __forceinline__ void StoreCodes(uint32_t codes, float scale, float* out) {
  float values[4];
  CodesToFloat<DType::kE4M3>(codes, values);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = values[i] * scale;
}

// A warp dequantises one token.
__device__ void LoadToken(const MlaSelection& s, const Divisor& page_size, uint32_t slot, int dim,
                          float* out) {
  const int lane = threadIdx.x % 32;
  const uint32_t page = page_size.Quotient(slot), row = slot - page * page_size.divisor;
  const MlaRow at = MlaRowOf(s.cache, s.cache.format, page, row);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(at.codes);
  const MlaFormatFacts facts = FactsOf(s.cache.format);
  if (s.cache.format == MlaFormat::kBf16) {
    for (int i = lane; i < dim / 2; i += 32) StoreBf16(__ldg(words + i), out + 2 * i);
    return;
  }
  if (s.cache.format == MlaFormat::kFp8) {
    const float scale = __ldg(s.scale);
    for (int i = lane; i < dim / 4; i += 32) StoreCodes(__ldg(words + i), scale, out + 4 * i);
    return;
  }
  for (int i = lane; i < facts.tiles * facts.tile / 4; i += 32) {
    const int tile = 4 * i / facts.tile;
    const float scale = ScalePlaneBytes(s.cache.format) > 0
                            ? UE8M0ToFloat(__ldg(at.scales + tile))
                            : __ldg(reinterpret_cast<const float*>(at.scales) + tile);
    StoreCodes(__ldg(words + i), scale, out + 4 * i);
  }
  if (s.cache.format == MlaFormat::kFp8x528) return;  // the rotated channels are codes, too
  const int rope_word = facts.row_bytes / 4 - kMlaRopeDim / 2 + lane;
  StoreBf16(__ldg(words + rope_word), out + facts.latent + 2 * lane);
}

// One head of one query token; of a head past the last one only the loads are wanted.
struct Head {
  float q[kLaneDims];
  float acc[kLaneValues];
  float maximum;  // base-2 logarithm
  float sum;
};

__device__ __forceinline__ void AttendTile(const Tile& tile, int dims, float factor, Head* head) {
  constexpr float kInf = __builtin_huge_valf();
  const int lane = threadIdx.x % 32;
  float scores[kTileKeys];
  float maximum = head->maximum;
#pragma unroll
  for (int j = 0; j < kTileKeys; ++j) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      if (i < dims) sum = fmaf(head->q[i], tile.keys[j][lane + 32 * i], sum);
    }
    scores[j] = tile.there[j] ? SumOfWarp(sum) * factor : -kInf;
    maximum = fmaxf(maximum, scores[j]);  // not a NaN
  }
  const float base = maximum == -kInf ? 0.0f : maximum;
  const float rescale = exp2f(head->maximum - base);
  head->maximum = maximum;
  head->sum *= rescale;
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) head->acc[i] *= rescale;
#pragma unroll
  for (int j = 0; j < kTileKeys; ++j) {
    const float weight = exp2f(scores[j] - base);
    head->sum += weight;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      head->acc[i] = fmaf(weight, tile.keys[j][lane + 32 * i], head->acc[i]);
    }
  }
}

// All warps take part.
__device__ __forceinline__ void AttendSelection(const MlaSparseParams& p, const MlaSelection& s,
                                                const Divisor& page_size, int64_t token, Tile* tile,
                                                Head* head) {
  if (s.topk == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int length = s.lengths == nullptr ? s.topk : min(__ldg(s.lengths + token), s.topk);
  const int* indices = s.indices + token * s.index_stride;
  const int64_t slots = s.cache.num_pages * s.cache.page_size;
  for (int begin = 0; begin < length; begin += kTileKeys) {
    for (int j = warp; j < kTileKeys; j += kWarps) {
      const int slot = begin + j < length ? __ldg(indices + begin + j) : -1;
      const bool there = slot >= 0 && slot < slots;
      if (there) {
        LoadToken(s, page_size, slot, p.dim, tile->keys[j]);
      } else {
        for (int i = lane; i < p.dim; i += 32) tile->keys[j][i] = 0.0f;
      }
      if (lane == 0) tile->there[j] = there;
    }
    __syncthreads();
    AttendTile(*tile, p.dim / 32, p.softmax_scale * kLog2E, head);
    __syncthreads();
  }
}

__device__ __forceinline__ void StoreHead(const MlaSparseParams& p, int64_t token, int h,
                                          const Head& head) {
  const int64_t row = token * p.heads + h, at = p.StatisticAt(token, h);
  const int lane = threadIdx.x % 32;
  const Normaliser end =
      NormaliserWithoutSink(head.maximum, head.sum, p.sinks, [&] { return __ldg(p.sinks + h); });
#pragma unroll
  for (int i = 0; i < kLaneValues; ++i) {
    const int64_t channel = row * kMlaValueDim + lane + 32 * i;
    const float value = head.acc[i] * end.factor;
    if (p.out_float != nullptr) {
      p.out_float[channel] = value;
    } else {
      p.out[channel] = FloatToBFloat16(value);
    }
  }
  if (p.max_logits != nullptr && lane == 0) {
    p.max_logits[at] = LargestLogit(head.maximum, head.sum);
  }
  if (p.lse != nullptr && lane == 0) {
    p.lse[at] = head.sum == 0.0f ? p.LonelyLse() : end.lse;
  }
}

__global__ void __launch_bounds__(kThreads)
    SimpleKernel(const __grid_constant__ MlaSparseParams p, const PageSizes page_sizes,
                 Divisor groups) {
  __shared__ Tile tile;
  const uint32_t token = groups.Quotient(blockIdx.x);
  const int lane = threadIdx.x % 32;
  const int h = (blockIdx.x - token * groups.divisor) * kWarps + threadIdx.x / 32;
  Head head = {};
  head.maximum = -__builtin_huge_valf();
  if (h < p.heads) {
    const uint16_t* q = p.q + token * p.q_token_stride + h * p.q_head_stride;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      if (i < p.dim / 32) head.q[i] = BFloat16ToFloat(__ldg(q + lane + 32 * i));
    }
  }
  AttendSelection(p, p.keys, page_sizes.keys, token, &tile, &head);
  AttendSelection(p, p.extra, page_sizes.extra, token, &tile, &head);
  if (h < p.heads) StoreHead(p, token, h, head);
}

}  // namespace

cudaError_t LaunchMlaSparseSimple(const MlaSparseParams& p, cudaStream_t stream) {
  const int groups = (p.heads + kWarps - 1) / kWarps;
  const PageSizes page_sizes = {Divisor(static_cast<uint32_t>(p.keys.cache.page_size)),
                                Divisor(static_cast<uint32_t>(p.extra.cache.page_size))};
  return LaunchKernel(SimpleKernel, dim3(GridSize(p.tokens * groups)), dim3(kThreads), stream, p,
                      page_sizes, Divisor(static_cast<uint32_t>(groups)));
}

}  // namespace fastattn::cuda
