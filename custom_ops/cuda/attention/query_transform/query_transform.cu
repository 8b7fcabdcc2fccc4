// Queries for transformed keys, ahead of the attention: neighbouring lanes take a (token, head)
// pair with 8 channels each. And what puts LSE and output right behind it.
#include "common/dispatch.h"
#include "common/exact.h"
#include "common/head_dims.h"
#include "common/numeric.h"
#include "common/score_shift.h"
#include "cuda/attention/query_transform/launch.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/hadamard.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/vector.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;

// Lanes of a pair: a power of two, of which some have no channels if D is none.
constexpr int LanesOf(int head_dim) {
  int lanes = 1;
  while (lanes * kChunk < head_dim) lanes *= 2;
  return lanes;
}

template <DType kIn, int kHeadDim, bool kVector>
__global__ void __launch_bounds__(kThreads)
    TransformQueryKernel(const __grid_constant__ QueryTransformParams p, const Divisor heads,
                         const Divisor group) {
  constexpr int kLanes = LanesOf(kHeadDim);
  static_assert(kLanes <= 32, "a warp's lanes exchange");
  const uint32_t total = static_cast<uint32_t>(p.num_tokens) * heads.divisor;
  const uint32_t pair = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const uint32_t token = heads.Quotient(pair);
  const uint32_t head = pair - token * heads.divisor;
  const bool active = pair < total && lane * kChunk < kHeadDim;
  PdlWait();
  Raw<kIn> raw;
  raw.low = make_uint4(0, 0, 0, 0);
  if (active) {
    const auto* q = static_cast<const uint16_t*>(p.q) + token * p.q_token_stride +
                    head * p.q_head_stride + lane * kChunk;
    if constexpr (kVector) {
      raw.low = *reinterpret_cast<const uint4*>(q);
    } else {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = q[2 * i] | static_cast<uint32_t>(q[2 * i + 1]) << 16;
      raw.low = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  PdlLaunchDependents();
  float x[kChunk];
  Unpack<kIn>(raw, x);
  if (p.shifts != nullptr) {
    float sum = 0.0f;
    if (active) {
      const float* center = p.center + group.Quotient(head) * kHeadDim + lane * kChunk;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum += x[i] * __ldg(center + i);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
    }
    if (active && lane == 0) p.shifts[pair] = sum * p.softmax_scale;
  }
  if (p.rotated == nullptr) return;
  HadamardOfChunks<kHeadDim>(lane, x);
  if (active) {
    const uint4 words = make_uint4(PackPair<kIn>(x[0], x[1]), PackPair<kIn>(x[2], x[3]),
                                   PackPair<kIn>(x[4], x[5]), PackPair<kIn>(x[6], x[7]));
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.rotated) +
                              static_cast<int64_t>(pair) * kHeadDim + lane * kChunk) = words;
  }
}

template <DType kIn, int kHeadDim>
cudaError_t LaunchTransform(const QueryTransformParams& p, cudaStream_t stream) {
  const bool vector = reinterpret_cast<uintptr_t>(p.q) % 16 == 0 &&
                      p.q_token_stride % kChunk == 0 && p.q_head_stride % kChunk == 0;
  constexpr int64_t kPairs = kThreads / LanesOf(kHeadDim);
  const int64_t total = static_cast<int64_t>(p.num_tokens) * p.num_heads;
  const dim3 grid(static_cast<unsigned>((total + kPairs - 1) / kPairs));
  return LaunchPdl(vector ? TransformQueryKernel<kIn, kHeadDim, true>
                          : TransformQueryKernel<kIn, kHeadDim, false>,
                   grid, dim3(kThreads), stream, p, Divisor(static_cast<uint32_t>(p.num_heads)),
                   Divisor(static_cast<uint32_t>(p.num_heads / p.num_kv_heads)));
}

// A thread for each pair.
__global__ void __launch_bounds__(kThreads)
    ShiftLseKernel(const __grid_constant__ ScoreShiftParams p) {
  const uint32_t at = blockIdx.x * kThreads + threadIdx.x;
  PdlWait();
  PdlLaunchDependents();
  const uint32_t tokens = static_cast<uint32_t>(p.num_tokens);
  if (at >= tokens * static_cast<uint32_t>(p.num_heads)) return;
  const uint32_t head = at / tokens, token = at - head * tokens;
  p.lse[at] = ShiftedLse(p.lse_in[at], p.shifts[token * p.num_heads + head]);
}

// A warp for each pair.
template <DType kOut>
__global__ void __launch_bounds__(kThreads)
    ShiftOutputKernel(const __grid_constant__ ScoreShiftParams p) {
  using E = Element<kOut>;
  const uint32_t pair = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  PdlWait();
  PdlLaunchDependents();
  const uint32_t heads = static_cast<uint32_t>(p.num_heads);
  if (pair >= static_cast<uint32_t>(p.num_tokens) * heads) return;
  const uint32_t token = pair / heads, head = pair - token * heads;
  const uint32_t at = head * static_cast<uint32_t>(p.num_tokens) + token;
  const float sink = LoadScale(p.sinks, p.sinks_dtype, head);
  const Normaliser found = ShiftedNormaliser(p.lse_in[at], p.shifts[pair], sink);
  if (p.lse != nullptr && lane == 0) p.lse[at] = found.lse;
  const float inverse = p.out_scale == nullptr ? 1.0f : Div(1.0f, *p.out_scale);
  const int64_t first = static_cast<int64_t>(pair) * p.value_dim;
  for (int d = lane; d < p.value_dim; d += 32) {
    static_cast<typename E::Storage*>(p.out)[first + d] =
        E::Store(p.partial[first + d] * found.factor * inverse);
  }
}

unsigned GridOf(const ScoreShiftParams& p, int64_t pairs_of_cta) {
  const int64_t total = static_cast<int64_t>(p.num_tokens) * p.num_heads;
  return static_cast<unsigned>((total + pairs_of_cta - 1) / pairs_of_cta);
}

}  // namespace

cudaError_t LaunchTransformQuery(const QueryTransformParams& p, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (p.num_tokens <= 0 || p.num_heads <= 0) return status;
  if (p.rotated == nullptr && p.shifts == nullptr) return status;
  dispatch<DType::kBFloat16, DType::kFloat16>(p.q_dtype, "q", [&](auto dtype) {
    AttentionHeadDims::Dispatch(p.head_dim, [&](auto head_dim) {
      status = LaunchTransform<decltype(dtype)::value, decltype(head_dim)::value>(p, stream);
    });
  });
  return status;
}

cudaError_t LaunchShiftScores(const ScoreShiftParams& p, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (p.shifts == nullptr || p.num_tokens <= 0 || p.num_heads <= 0) return status;
  if (p.sinks == nullptr) {
    return LaunchPdl(ShiftLseKernel, dim3(GridOf(p, kThreads)), dim3(kThreads), stream, p);
  }
  dispatch<DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kE4M3>(
      p.out_dtype, "out", [&](auto dtype) {
        status = LaunchPdl(ShiftOutputKernel<decltype(dtype)::value>,
                           dim3(GridOf(p, kThreads / 32)), dim3(kThreads), stream, p);
      });
  return status;
}

}  // namespace fastattn::cuda
