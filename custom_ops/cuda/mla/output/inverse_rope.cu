// inverse_rope_quantize_fp8 on a GPU. A warp has one head of four tokens, and a lane 16
// neighbouring channels of each: a scale belongs to 8 lanes, and a block's scales of the four
// tokens, which lie side by side, are one store of 16 bytes. The rotated channels are in the last
// four lanes.
#include <limits>

#include "common/exact.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/index_load.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/rotate.cuh"
#include "cuda/mla/output/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kWarps = 4;  // of a CTA
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = kMlaScaleTokens;  // of a warp
constexpr int kLaneChannels = kMlaOutputDim / 32;
constexpr int kBlockLanes = kMlaOutputBlock / kLaneChannels;
constexpr int kFirstRotatedLane = 32 - Angles<4>::kRow / kLaneChannels;

struct Grid {
  Divisor heads;
  uint32_t count;  // of warps with work
};

__device__ __forceinline__ void Unpack(const uint4 (&raw)[2], float (&x)[kLaneChannels]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t words[4] = {raw[half].x, raw[half].y, raw[half].z, raw[half].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[8 * half + 2 * i] = BitsFloat(words[i] << 16);
      x[8 * half + 2 * i + 1] = BitsFloat(words[i] & 0xFFFF0000u);
    }
  }
}

__device__ __forceinline__ uint32_t Codes4(const float* x, float inverse) {
  return PackCodes<DType::kE4M3>(Mul(x[0], inverse), Mul(x[1], inverse), Mul(x[2], inverse),
                                 Mul(x[3], inverse));
}

// kPlain: see IsPlain.
template <bool kPlain>
__global__ void __launch_bounds__(kThreads, 2)
    InverseRopeKernel(const __grid_constant__ InverseRopeParams p, Grid grid) {
  const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  PdlWait();
  if (warp >= grid.count) return;
  const uint32_t four = grid.heads.Quotient(warp);
  const int head = static_cast<int>(warp - four * grid.heads.divisor);
  const int64_t first = int64_t{four} * kTokens;
  const int tokens = static_cast<int>(min(int64_t{kTokens}, p.num_tokens - first));
  const bool rotated = lane >= kFirstRotatedLane;

  const uint16_t* in = p.x + first * p.token_stride + head * p.head_stride + lane * kLaneChannels;
  uint4 raw[kTokens][2];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    raw[t][0] = raw[t][1] = make_uint4(0, 0, 0, 0);
    if (t < tokens) {
      const auto* from = reinterpret_cast<const uint4*>(in + t * p.token_stride);
      raw[t][0] = __ldg(from);
      raw[t][1] = __ldg(from + 1);
    }
  }
  // Lane t has the position of token t.
  LoadedIndex position;
  position.Load(p.rotations.positions, first + min(lane, tokens - 1));
  // Here, since the compiler moves no load over it: the shuffles below wait for a position, and all
  // other loads are to be under way by then. All angles are before one is used.
  PdlLaunchDependents();
  const int64_t own_row = p.rotations.RowOf(position.Value());
  Angles<kLaneChannels / 2> angles[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int64_t row = __shfl_sync(kFullWarp, own_row, t);
    const int pair = (lane - kFirstRotatedLane) * (kLaneChannels / 2);
    angles[t].template Load<kPlain>(p.rotations, row, pair, rotated && t < tokens);
  }

  float scales[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float x[kLaneChannels];
    Unpack(raw[t], x);
    if (rotated) angles[t].template Rotate<true>(x);
    __syncwarp();
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) amax = max(amax, AbsBits(x[i]));
    const float scale = PowerOfTwoFp8Scale(LanesMax<kBlockLanes>(amax), kActivationFloorBits);
    const float inverse = PowerOfTwoInverse(scale);
    scales[t] = t < tokens ? scale : 0.0f;
    if (t < tokens) {
      *reinterpret_cast<uint4*>(p.codes + p.CodesOf(first + t, head) + lane * kLaneChannels) =
          make_uint4(Codes4(x, inverse), Codes4(x + 4, inverse), Codes4(x + 8, inverse),
                     Codes4(x + 12, inverse));
    }
  }
  if (lane % kBlockLanes == 0) {
    const int64_t block = int64_t{head} * kMlaOutputBlocks + lane / kBlockLanes;
    *reinterpret_cast<float4*>(p.scales + block * p.padded_tokens + first) =
        make_float4(scales[0], scales[1], scales[2], scales[3]);
  }
}

}  // namespace

cudaError_t LaunchInverseRopeQuantizeFp8(const InverseRopeParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_heads == 0) return cudaSuccess;
  const int64_t fours = p.padded_tokens / kTokens;
  if (fours > (std::numeric_limits<int32_t>::max() - kWarps) / int64_t{p.num_heads}) {
    return cudaErrorInvalidValue;  // 8 TiB of outputs
  }
  Grid grid;
  grid.heads = Divisor(static_cast<uint32_t>(p.num_heads));
  grid.count = static_cast<uint32_t>(fours * p.num_heads);
  const dim3 ctas((grid.count + kWarps - 1) / kWarps);
  const auto kernel = IsPlain(p.rotations) ? InverseRopeKernel<true> : InverseRopeKernel<false>;
  return LaunchPdl(kernel, ctas, dim3(kThreads), stream, p, grid);
}

}  // namespace fastattn::cuda
