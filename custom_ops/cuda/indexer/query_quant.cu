// indexer_q_quant. Eight lanes hold a head of a query, 16 neighbouring channels each.
#include <limits>

#include "common/exact.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/dynamic_scale.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/indexer/launch.h"
#include "params/quantize.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kLaneChannels = 2 * kChunk;
constexpr int kLanes = kIndexerHeadDim / kLaneChannels;  // of a head

struct HeadGrid {
  Divisor heads;   // of a query
  uint32_t count;  // of heads in all
};

// kAligned: every address suits a 16-byte load.
template <bool kAligned>
__device__ __forceinline__ uint4 LoadChunk(const uint16_t* q, bool active) {
  if constexpr (kAligned) return LoadRaw<DType::kBFloat16>(q, 0, active).low;
  return LoadRawUnaligned<DType::kBFloat16>(q, 0, active).low;
}

__device__ __forceinline__ uint2 Codes(const uint4& chunk, float inverse) {
  float x[kChunk];
  Unpack<DType::kBFloat16>(Raw<DType::kBFloat16>{chunk, chunk}, x);
#pragma unroll
  for (float& value : x) value = Mul(value, inverse);
  return make_uint2(PackCodes<DType::kE4M3>(x[0], x[1], x[2], x[3]),
                    PackCodes<DType::kE4M3>(x[4], x[5], x[6], x[7]));
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    QueryQuantKernel(const __grid_constant__ IndexerQQuantParams p, HeadGrid grid) {
  const uint32_t index = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool active = index < grid.count;
  const uint32_t query = grid.heads.Quotient(index);
  const uint32_t head = index - query * grid.heads.divisor;
  const int lane = threadIdx.x % kLanes;
  PdlWait();
  PdlLaunchDependents();
  const int64_t token = active ? p.TokenOf(query) : -1;
  const bool live = token >= 0;
  const uint16_t* q = p.q + token * p.q_token_stride + head * p.q_head_stride;
  const uint4 low = LoadChunk<kAligned>(q + lane * kLaneChannels, live);
  const uint4 high = LoadChunk<kAligned>(q + lane * kLaneChannels + kChunk, live);
  float weight = 0.0f;
  if (live && lane == 0) {
    weight = LoadScale(p.weights, p.weights_dtype, token * p.num_heads + head);
  }
  // All lanes of a warp exchange; those without a head hold zeros.
  const uint32_t pair = LanesMax2<kLanes>(__vmaxu2(AmaxPair(low), AmaxPair(high)));
  const float scale =
      FastDynamicScale(max(pair << 16, pair & 0xFFFF0000u), kActivationAmaxFloor, kE4M3Max);
  const float inverse = ReciprocalOfNormal(scale);
  const uint2 first = Codes(low, inverse), second = Codes(high, inverse);
  if (!active) return;
  *reinterpret_cast<uint4*>(p.codes + int64_t{index} * kIndexerHeadDim + lane * kLaneChannels) =
      make_uint4(first.x, first.y, second.x, second.y);
  if (lane == 0) p.weights_out[index] = live ? Mul(weight, Mul(scale, p.factor)) : 0.0f;
}

}  // namespace

cudaError_t LaunchIndexerQQuant(const IndexerQQuantParams& p, cudaStream_t stream) {
  if (p.num_queries == 0 || p.num_heads == 0) return cudaSuccess;
  if (p.num_queries > (std::numeric_limits<int32_t>::max() - kThreads) / p.num_heads) {
    return cudaErrorInvalidValue;  // 256 GiB of codes
  }
  HeadGrid grid;
  grid.heads = Divisor(static_cast<uint32_t>(p.num_heads));
  grid.count = static_cast<uint32_t>(p.num_queries * p.num_heads);
  const bool aligned =
      IsAligned(p.q, 16) && p.q_token_stride % kChunk == 0 && p.q_head_stride % kChunk == 0;
  constexpr int kHeads = kThreads / kLanes;  // of a CTA
  const dim3 ctas((grid.count + kHeads - 1) / kHeads);
  const auto kernel = aligned ? QueryQuantKernel<true> : QueryQuantKernel<false>;
  return LaunchPdl(kernel, ctas, dim3(kThreads), stream, p, grid);
}

}  // namespace fastattn::cuda
