// inverse_rope_quantize_fp8 on a GPU. A warp has one head of a token: a lane has 8 neighbouring
// channels of either half, so that a warp's loads are 512 bytes side by side, and a scale belongs
// to 16 lanes. The rotated channels are the last 8 lanes' in the second half. The warps of a CTA
// have neighbouring heads, which share a position and a row of angles.
//
// More heads or tokens a warp keep more bytes under way in it but leave room for fewer warps, and a
// warp's life is a chain of loads (position, angles) that only other warps fill.
#include <limits>

#include "common/exact.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/dynamic_scale.cuh"
#include "cuda/common/index_load.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/rotate.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/mla/output/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kWarps = 4;  // of a CTA
constexpr int kThreads = 32 * kWarps;
static_assert(kMlaScaleTokens % kWarps == 0, "CTAs of padded tokens are whole");
constexpr int kHalf = kMlaOutputDim / 2;
constexpr int kBlockLanes = kMlaOutputBlock / kChunk;
constexpr int kFirstRotatedLane = 32 - Angles<4>::kRow / kChunk;
static_assert(kHalf == 32 * kChunk, "a chunk of each half a lane");
static_assert(kMlaOutputBlocks == 4 && kBlockLanes == 16, "two blocks a half");

__device__ __forceinline__ void Widen(uint4 pairs, float (&x)[kChunk]) {
  Unpack<DType::kBFloat16>(Raw<DType::kBFloat16>{pairs, pairs}, x);
}

__device__ __forceinline__ uint2 Codes(const float (&x)[kChunk], float inverse) {
  return make_uint2(PackCodes<DType::kE4M3>(Mul(x[0], inverse), Mul(x[1], inverse),
                                            Mul(x[2], inverse), Mul(x[3], inverse)),
                    PackCodes<DType::kE4M3>(Mul(x[4], inverse), Mul(x[5], inverse),
                                            Mul(x[6], inverse), Mul(x[7], inverse)));
}

// The upper 16 bits of the largest magnitude, rounded up: that changes neither the power of two
// that its scale is (the bounds between these have 16 bits) nor whether it is NaN.
__device__ __forceinline__ uint32_t AmaxUp(const float (&x)[kChunk]) {
  uint32_t amax = 0;
#pragma unroll
  for (float value : x) amax = max(amax, AbsBits(value));
  return (amax + 0xFFFFu) >> 16;
}

// Scales of the lane's block of either half: 0 or 1, and 2 or 3.
__device__ __forceinline__ void StoreScales(const InverseRopeParams& p, int64_t token, int head,
                                            float first, float second) {
  const int lane = threadIdx.x % 32;
  if (lane % kBlockLanes != 0) return;
  const int64_t block = int64_t{head} * kMlaOutputBlocks + lane / kBlockLanes;
  float* to = p.scales + block * p.padded_tokens + token;
  to[0] = first;
  to[2 * p.padded_tokens] = second;
}

// kPlain: see IsPlain.
template <bool kPlain>
__global__ void __launch_bounds__(kThreads)
    InverseRopeKernel(const __grid_constant__ InverseRopeParams p, Divisor heads) {
  const uint32_t unit = blockIdx.x * kWarps + threadIdx.x / 32;
  const int64_t token = heads.Quotient(unit);
  const int head = static_cast<int>(unit - static_cast<uint32_t>(token) * heads.divisor);
  const int lane = threadIdx.x % 32;
  const auto* from =
      reinterpret_cast<const uint4*>(p.x + token * p.token_stride + head * p.head_stride) + lane;
  PdlWait();
  if (token >= p.num_tokens) {  // behind the last one: scales alone
    StoreScales(p, token, head, 0.0f, 0.0f);
    return;
  }
  LoadedIndex position;
  position.Load(p.rotations.positions, token);
  const uint4 low = __ldg(from), high = __ldg(from + 32);
  const bool rotated = lane >= kFirstRotatedLane;
  Angles<kChunk / 2> angles;
  angles.template Load<kPlain>(p.rotations, p.rotations.RowOf(position.Value()),
                               (lane - kFirstRotatedLane) * (kChunk / 2), rotated);
  // Behind the loads: the compiler moves none over it.
  PdlLaunchDependents();

  float x[kChunk], y[kChunk];
  Widen(low, x);
  Widen(high, y);
  const uint32_t first = AmaxPair(low);
  uint32_t second = AmaxPair(high);
  second = max(second & 0xFFFFu, second >> 16);
  if (rotated) {
    angles.template Rotate<true>(y);
    second = AmaxUp(y);
  }
  __syncwarp();
  const uint32_t amax = LanesMax2<kBlockLanes>(max(first & 0xFFFFu, first >> 16) | second << 16);
  const float scale0 = PowerOfTwoFp8Scale(amax << 16, kActivationFloorBits);
  const float scale1 = PowerOfTwoFp8Scale(amax & 0xFFFF0000u, kActivationFloorBits);
  uint8_t* codes = p.codes + p.CodesOf(token, head) + lane * kChunk;
  *reinterpret_cast<uint2*>(codes) = Codes(x, PowerOfTwoInverse(scale0));
  *reinterpret_cast<uint2*>(codes + kHalf) = Codes(y, PowerOfTwoInverse(scale1));
  StoreScales(p, token, head, scale0, scale1);
}

}  // namespace

cudaError_t LaunchInverseRopeQuantizeFp8(const InverseRopeParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_heads == 0) return cudaSuccess;
  if (p.padded_tokens > std::numeric_limits<int32_t>::max() / int64_t{p.num_heads}) {
    return cudaErrorInvalidValue;  // 1 TiB of outputs
  }
  // Padded tokens are a multiple of the warps.
  const dim3 ctas(static_cast<unsigned>(p.padded_tokens / kWarps * p.num_heads));
  const auto kernel = IsPlain(p.rotations) ? InverseRopeKernel<true> : InverseRopeKernel<false>;
  return LaunchPdl(kernel, ctas, dim3(kThreads), stream, p,
                   Divisor(static_cast<uint32_t>(p.num_heads)));
}

}  // namespace fastattn::cuda
