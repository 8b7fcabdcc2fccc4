// Merge of strided tensors, 16 bytes at a time: a thread takes one of the `packs` packs of a head.
//
// threadIdx.x runs over the packs of a head, y over heads, z over tokens: no index needs a
// division. A CTA takes several tokens because the LSEs of a head's tokens usually share a 32-byte
// sector, which then comes from L1 for all but the first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/merge/shared/merge_values.cuh"
#include "cuda/merge/shared/merge_weights.h"
#include "params/merge.h"
#include "params/quantize.h"

namespace fastattn::cuda {

inline constexpr int kMaxMergeThreads = 1024;

struct MergePointers {
  const void* prefix_output;
  const void* suffix_output;
  const float* prefix_lse;
  const float* suffix_lse;
  const float* output_scale;
  void* output;
  float* output_lse;
  float* output_scales;
};

// MergeParams with 32-bit strides: half the parameters to fetch before the first address is known,
// and one multiply-add for each. Strides count elements.
struct MergeVectorParams : MergePointers {
  int num_tokens, merged_tokens, num_heads;
  int packs;  // 16-byte packs of a head
  int prefix_token_stride, prefix_head_stride;
  int suffix_token_stride, suffix_head_stride;
  int output_token_stride, output_head_stride;
  int prefix_lse_head_stride, prefix_lse_token_stride;
  int suffix_lse_head_stride, suffix_lse_token_stride;
  int output_lse_head_stride, output_lse_token_stride;
  int output_scales_token_stride;
  int log2_segment;  // kDynamicFp8: 2^this neighbouring threads share a scale, at most a warp
};

__device__ __forceinline__ int64_t Offset(int i, int i_stride, int j, int j_stride) {
  return static_cast<int64_t>(i) * i_stride + static_cast<int64_t>(j) * j_stride;
}

// Each element is read once, so that it is evicted first. The load does not take the read-only
// path, as the output may be this memory.
__device__ __forceinline__ uint4 LoadPack(const char* address, bool active) {
  return active ? __ldcs(reinterpret_cast<const uint4*>(address)) : make_uint4(0, 0, 0, 0);
}

// With kStream the caches evict first what is stored.
template <bool kStream, typename Pack>
__device__ __forceinline__ void StorePack(void* address, const Pack& pack) {
  if constexpr (kStream) {
    __stcs(static_cast<Pack*>(address), pack);
  } else {
    *static_cast<Pack*>(address) = pack;
  }
}

template <DType kStored, bool kStream, int kWidth>
__device__ __forceinline__ void StoreValues(void* output, int64_t at, const float (&x)[kWidth]) {
  char* address = static_cast<char*>(output) + at * SizeOf(kStored);
  if constexpr (kStored == DType::kFloat32) {
    StorePack<kStream>(address, make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]),
                                           __float_as_uint(x[2]), __float_as_uint(x[3])));
  } else if constexpr (kWidth == 8) {
    StorePack<kStream>(address,
                       make_uint4(PackPair<kStored>(x[0], x[1]), PackPair<kStored>(x[2], x[3]),
                                  PackPair<kStored>(x[4], x[5]), PackPair<kStored>(x[6], x[7])));
  } else {
    StorePack<kStream>(address,
                       make_uint2(PackPair<kStored>(x[0], x[1]), PackPair<kStored>(x[2], x[3])));
  }
}

template <bool kStream, int kWidth>
__device__ __forceinline__ void StoreCodes(void* output, int64_t at, const float (&x)[kWidth],
                                           float inverse) {
  uint32_t words[kWidth / 4];
#pragma unroll
  for (int w = 0; w < kWidth / 4; ++w) {
    words[w] = PackCodes<DType::kE4M3>(Mul(x[4 * w], inverse), Mul(x[4 * w + 1], inverse),
                                       Mul(x[4 * w + 2], inverse), Mul(x[4 * w + 3], inverse));
  }
  char* address = static_cast<char*>(output) + at;
  if constexpr (kWidth == 8) {
    StorePack<kStream>(address, make_uint2(words[0], words[1]));
  } else {
    StorePack<kStream>(address, words[0]);
  }
}

// Scale of a segment of threads, written by its first one.
template <int kWidth>
__device__ __forceinline__ float SegmentScale(const MergeVectorParams& p, int token, int head,
                                              bool active, const float (&x)[kWidth]) {
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) amax = max(amax, AbsBits(x[i]));
  for (int lanes = 1; lanes < 1 << p.log2_segment; lanes *= 2) {
    amax = max(amax, __shfl_xor_sync(kFullWarp, amax, lanes));
  }
  const float scale = DynamicScale(amax, kActivationAmaxFloor, kE4M3Max);
  const int lane = head * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  const int segment = lane >> p.log2_segment;
  if (active && lane == segment << p.log2_segment) {
    p.output_scales[static_cast<int64_t>(token) * p.output_scales_token_stride + segment] = scale;
  }
  return scale;
}

template <DType kIn, MergeOutput kOutput>
__global__ void __launch_bounds__(kMaxMergeThreads)
    MergeVectorKernel(const __grid_constant__ MergeVectorParams p) {
  constexpr int kWidth = kPackWidth<kIn>;
  const int token = static_cast<int>(blockIdx.x * blockDim.z + threadIdx.z);
  const int head = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  const int pack = static_cast<int>(threadIdx.x);
  const bool active = token < p.num_tokens && head < p.num_heads && pack < p.packs;
  const bool has_prefix = active && token < p.merged_tokens;

  // All loads before anything that waits for one.
  const char* prefix =
      static_cast<const char*>(p.prefix_output) +
      Offset(token, p.prefix_token_stride, head, p.prefix_head_stride) * SizeOf(kIn);
  const char* suffix =
      static_cast<const char*>(p.suffix_output) +
      Offset(token, p.suffix_token_stride, head, p.suffix_head_stride) * SizeOf(kIn);
  const uint4 a = LoadPack(prefix + pack * 16, has_prefix);
  const uint4 b = LoadPack(suffix + pack * 16, active);
  float prefix_lse = -INFINITY, suffix_lse = -INFINITY, scale = 1.0f;
  if (has_prefix) {
    prefix_lse = p.prefix_lse[Offset(head, p.prefix_lse_head_stride,  //
                                     token, p.prefix_lse_token_stride)];
  }
  if (active) {
    suffix_lse = p.suffix_lse[Offset(head, p.suffix_lse_head_stride,  //
                                     token, p.suffix_lse_token_stride)];
  }
  if constexpr (kOutput == MergeOutput::kStaticFp8) scale = __ldg(p.output_scale);

  float inverse = Div(1.0f, scale);
  const MergeWeights w = WeightsOfSides(prefix_lse, suffix_lse);
  float x[kWidth];
  MergePack<kIn>(a, b, w, x);
  if constexpr (kOutput == MergeOutput::kDynamicFp8) {
    inverse = Div(1.0f, SegmentScale(p, token, head, active, x));
  }
  if (active) {
    const int64_t element =
        Offset(token, p.output_token_stride, head, p.output_head_stride) + pack * kWidth;
    if constexpr (IsValues(kOutput)) {
      StoreValues<StoredType(kOutput, kIn), false>(p.output, element, x);
    } else {
      StoreCodes<false>(p.output, element, x, inverse);
    }
  }
  // All threads of a head have read its LSEs before one of them writes, maybe over them.
  __syncthreads();
  if (active && threadIdx.x == 0) {
    p.output_lse[Offset(head, p.output_lse_head_stride, token, p.output_lse_token_stride)] =
        MergedLse(w);
  }
}

}  // namespace fastattn::cuda
