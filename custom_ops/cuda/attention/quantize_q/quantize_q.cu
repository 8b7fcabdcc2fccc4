// Queries to e4m3 codes: D / 8 neighbouring lanes of a power of two take a (token, head) pair with
// 8 channels each, and a thread several pairs, whose loads are all under way before the first is
// used.
#include "common/dispatch.h"
#include "common/exact.h"
#include "common/head_dims.h"
#include "cuda/attention/quantize_q/launch.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/dynamic_scale.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/vector.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPairs = 4;  // of a thread

// Lanes that share a head, as a power of two: those past its channels are idle.
constexpr int LanesOf(int head_dim) {
  int lanes = 1;
  while (lanes * kChunk < head_dim) lanes *= 2;
  return lanes;
}

// 8 channels from any address, in one load where it and the strides are multiples of 16 bytes.
template <bool kVector>
__device__ __forceinline__ uint4 LoadChannels(const void* q, int64_t element) {
  const auto* x = static_cast<const uint16_t*>(q) + element;
  if constexpr (kVector) {
    return __ldg(reinterpret_cast<const uint4*>(x));
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = __ldg(x + 2 * i) | static_cast<uint32_t>(__ldg(x + 2 * i + 1)) << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <DType kIn, int kHeadDim, bool kVector>
__global__ void __launch_bounds__(kThreads)
    QuantizeQueryKernel(const __grid_constant__ QuantizeQueryParams p, const Divisor heads) {
  constexpr int kLanes = LanesOf(kHeadDim);
  constexpr uint32_t kAtOnce = kThreads / kLanes;
  const uint32_t total = static_cast<uint32_t>(p.num_tokens) * heads.divisor;
  const uint32_t first = blockIdx.x * (kAtOnce * kPairs) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool in_head = kLanes * kChunk == kHeadDim || lane * kChunk < kHeadDim;
  PdlWait();
  Raw<kIn> raw[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t pair = first + i * kAtOnce;
    const uint32_t token = heads.Quotient(pair);
    const int64_t element =
        token * p.q_token_stride + (pair - token * heads.divisor) * p.q_head_stride + lane * kChunk;
    raw[i].low =
        pair < total && in_head ? LoadChannels<kVector>(p.q, element) : make_uint4(0, 0, 0, 0);
  }
  PdlLaunchDependents();
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t pair = first + i * kAtOnce;
    const float scale =
        FastDynamicScale(HeadAmaxBits<kLanes * kChunk, kIn>(raw[i].low), kCacheAmaxFloor, kE4M3Max);
    const float inverse = ReciprocalOfNormal(scale);
    float x[kChunk];
    Unpack<kIn>(raw[i], x);
    uint32_t words[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      words[w] = PackCodes<DType::kE4M3>(Mul(x[4 * w], inverse), Mul(x[4 * w + 1], inverse),
                                         Mul(x[4 * w + 2], inverse), Mul(x[4 * w + 3], inverse));
    }
    if (pair < total && in_head) {
      *reinterpret_cast<uint2*>(p.codes + static_cast<int64_t>(pair) * kHeadDim + lane * kChunk) =
          make_uint2(words[0], words[1]);
      if (lane == 0) p.descale[pair] = scale;
    }
  }
}

template <DType kIn, int kHeadDim>
cudaError_t Launch(const QuantizeQueryParams& p, cudaStream_t stream) {
  const bool vector = reinterpret_cast<uintptr_t>(p.q) % 16 == 0 &&
                      p.q_token_stride % kChunk == 0 && p.q_head_stride % kChunk == 0;
  constexpr int64_t kPerCta = int64_t{kThreads} * kPairs / LanesOf(kHeadDim);
  const int64_t total = static_cast<int64_t>(p.num_tokens) * p.num_heads;
  const dim3 grid(static_cast<unsigned>((total + kPerCta - 1) / kPerCta));
  const Divisor heads(static_cast<uint32_t>(p.num_heads));
  return LaunchPdl(
      vector ? QuantizeQueryKernel<kIn, kHeadDim, true> : QuantizeQueryKernel<kIn, kHeadDim, false>,
      grid, dim3(kThreads), stream, p, heads);
}

}  // namespace

cudaError_t LaunchQuantizeQuery(const QuantizeQueryParams& p, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (p.num_tokens <= 0 || p.num_heads <= 0) return status;
  dispatch<DType::kBFloat16, DType::kFloat16>(p.q_dtype, "q", [&](auto dtype) {
    AttentionHeadDims::Dispatch(p.head_dim, [&](auto head_dim) {
      status = Launch<decltype(dtype)::value, decltype(head_dim)::value>(p, stream);
    });
  });
  return status;
}

}  // namespace fastattn::cuda
