// indexer_q_rope_quant. Eight lanes hold a head. Each has 8 of the channels that are rotated and 8
// of those that are not, so that no lane idles while the others rotate. They convert kHeads heads
// of a token at once.
#include <limits>

#include "common/dispatch.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/e2m1.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/rotate.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 2;
constexpr int kLanes = kIndexerRopeDim / kChunk;  // of a head
static_assert(kIndexerHeadDim == 2 * kIndexerRopeDim, "a rotated and a plain chunk a lane");

// A lane's channels of a head.
struct Chunks {
  uint4 plain;    // 8 lane ..
  uint4 rotated;  // 64 + 8 lane ..
};

struct QueryGrid {
  Divisor groups;  // of kHeads heads in a token
  uint32_t count;  // of such groups in all
};

// kAligned: every address suits a 16-byte load.
template <bool kAligned>
__device__ __forceinline__ uint4 LoadChunk(const uint16_t* q, bool active) {
  if constexpr (kAligned) return LoadRaw<DType::kBFloat16>(q, 0, active).low;
  return LoadRawUnaligned<DType::kBFloat16>(q, 0, active).low;
}

// Rotates pairs of channels and rounds them to bf16 again.
__device__ __forceinline__ void Rotate(const float (&cos)[4], const float (&sin)[4], uint4& chunk) {
  constexpr DType kIn = DType::kBFloat16;
  float x[kChunk];
  Unpack<kIn>(Raw<kIn>{chunk, chunk}, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) RotatePair(cos[i], sin[i], x[2 * i], x[2 * i + 1]);
  chunk = make_uint4(PackPair<kIn>(x[0], x[1]), PackPair<kIn>(x[2], x[3]),
                     PackPair<kIn>(x[4], x[5]), PackPair<kIn>(x[6], x[7]));
}

// Largest |x| among the even and among the odd channels, as two bf16. A NaN is the largest with
// kNaNWins, and is ignored otherwise.
template <bool kNaNWins>
__device__ __forceinline__ uint32_t ChunkAmax(const uint4& x) {
  if constexpr (kNaNWins) {
    return __vmaxu2(__vmaxu2(x.x & 0x7FFF7FFFu, x.y & 0x7FFF7FFFu),
                    __vmaxu2(x.z & 0x7FFF7FFFu, x.w & 0x7FFF7FFFu));
  } else {
    const __nv_bfloat162 a = __hmax2(__habs2(AsBf162(x.x)), __habs2(AsBf162(x.y)));
    const __nv_bfloat162 b = __hmax2(__habs2(AsBf162(x.z)), __habs2(AsBf162(x.w)));
    return Bf162Bits(__hmax2(__hmax2(a, b), AsBf162(0)));  // 0 where all are NaN
  }
}

// Larger half of `low` in the low half, larger half of `high` in the high half.
__device__ __forceinline__ uint32_t LargerHalves(uint32_t low, uint32_t high) {
  return __vmaxu2(__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632));
}

__device__ __forceinline__ uint2 Fp8Codes(const uint4& chunk, uint32_t inverse) {
  constexpr DType kIn = DType::kBFloat16;
  const uint4 scaled = make_uint4(ScaleBf16Pair(chunk.x, inverse), ScaleBf16Pair(chunk.y, inverse),
                                  ScaleBf16Pair(chunk.z, inverse), ScaleBf16Pair(chunk.w, inverse));
  float x[kChunk];
  Unpack<kIn>(Raw<kIn>{scaled, scaled}, x);
  return make_uint2(PackCodes<DType::kE4M3>(x[0], x[1], x[2], x[3]),
                    PackCodes<DType::kE4M3>(x[4], x[5], x[6], x[7]));
}

// Stores the codes of the heads in rows `row`, `row` + 1, ... and their scales. Lane i < kHeads
// returns the scale of head i.
__device__ __forceinline__ float StoreFp8(const IndexerQParams& p, const Chunks (&x)[kHeads],
                                          int64_t row, int heads) {
  const int lane = threadIdx.x % kLanes;
  uint32_t amax[kHeads];  // of each head as bf16, in the high half
  static_assert(kHeads == 2, "the amaxes of two heads go through the lanes in one word");
  const uint32_t both = LanesMax2<kLanes>(
      LargerHalves(__vmaxu2(ChunkAmax<true>(x[0].plain), ChunkAmax<true>(x[0].rotated)),
                   __vmaxu2(ChunkAmax<true>(x[1].plain), ChunkAmax<true>(x[1].rotated))));
  amax[0] = both << 16;
  amax[1] = both & 0xFFFF0000u;
  float own_scale = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const float scale = PowerOfTwoFp8Scale(amax[i]);
    if (lane == i) own_scale = scale;
    const uint32_t inverse = __byte_perm(FloatBits(PowerOfTwoInverse(scale)), 0, 0x3232);
    uint2 plain = Fp8Codes(x[i].plain, inverse), rotated = Fp8Codes(x[i].rotated, inverse);
    // Even lanes take the plain codes of two lanes, odd lanes the rotated ones: 16 bytes each.
    SwapHalves(plain.x, rotated.x, 1);
    SwapHalves(plain.y, rotated.y, 1);
    if (i < heads) {
      const int at = lane % 2 * kIndexerRopeDim + lane / 2 * 16;
      *reinterpret_cast<uint4*>(p.codes + (row + i) * kIndexerHeadDim + at) =
          make_uint4(plain.x, plain.y, rotated.x, rotated.y);
    }
  }
  if (lane < heads) static_cast<float*>(p.scales)[row + lane] = own_scale;
  return own_scale;
}

__device__ __forceinline__ void StoreMxfp4(const IndexerQParams& p, const Chunks (&x)[kHeads],
                                           int64_t row, int heads) {
  constexpr int kBlockLanes = kMxBlock / kChunk;
  const int lane = threadIdx.x % kLanes;
  uint32_t codes[2 * kHeads];  // plain and rotated of each head
  uint32_t bytes[kHeads];      // exponents of this lane's plain and rotated block in bytes 0 and 2
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    // MxScaleByte and UE8M0Inverse of two bf16 at once.
    uint32_t amax = LanesMax2<kBlockLanes>(
        LargerHalves(ChunkAmax<false>(x[i].plain), ChunkAmax<false>(x[i].rotated)));
    amax = __vmaxu2(__vminu2(amax, 0x7F7F7F7Fu), 0x01C001C0u);
    const uint32_t exponent = (amax + 0x003F003Fu) & 0xFF80FF80u;
    const uint32_t inverse = 0x80008000u - exponent;
    bytes[i] = (exponent >> 7) - 0x00020002u;
    codes[2 * i] = PackE2M1OfBf16x8(x[i].plain, __byte_perm(inverse, 0, 0x1010));
    codes[2 * i + 1] = PackE2M1OfBf16x8(x[i].rotated, __byte_perm(inverse, 0, 0x3232));
  }
  static_assert(kHeads == 2, "a quad of lanes trades the words of two heads");
  TransposeQuad(codes);
  const int head = lane / 2 % 2;
  if (head < heads) {
    const int at = lane % 2 * (kIndexerRopeDim / 2) + lane / kBlockLanes * (kMxBlock / 2);
    *reinterpret_cast<uint4*>(p.codes + (row + head) * (kIndexerHeadDim / 2) + at) =
        make_uint4(codes[0], codes[1], codes[2], codes[3]);
  }
  // Lanes 0 to 3 get both words of head 0, the others both of head 1.
  SwapHalves(bytes[0], bytes[1], kBlockLanes);
  if (lane % kBlockLanes == 0 && lane / kBlockLanes < heads) {
    static_cast<uint32_t*>(p.scales)[row + lane / kBlockLanes] = bytes[0] | bytes[1] << 8;
  }
}

template <IndexerQuant kQuant, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    QueryKernel(const __grid_constant__ IndexerQParams p, const __grid_constant__ QueryGrid grid) {
  const uint32_t group = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool active = group < grid.count;
  const uint32_t token = grid.groups.Quotient(group);
  const int first_head = static_cast<int>((group - token * grid.groups.divisor) * kHeads);
  const int heads = active ? min(kHeads, p.num_heads - first_head) : 0;
  const int lane = threadIdx.x % kLanes;

  const uint16_t* q = p.q + token * p.q_token_stride + first_head * p.q_head_stride + lane * kChunk;
  const int64_t row = static_cast<int64_t>(token) * p.num_heads + first_head;
  PdlWait();
  // The position is loaded first, as the angles wait for it.
  int64_t position = active ? p.positions.At(token) : 0;
  Chunks x[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const uint16_t* head = q + i * p.q_head_stride;
    x[i].plain = LoadChunk<kAligned>(head, i < heads);
    x[i].rotated = LoadChunk<kAligned>(head + kIndexerRopeDim, i < heads);
  }
  float weight = 0.0f;
  if (lane < heads) weight = LoadScale(p.weights, p.weights_dtype, row + lane);

  position = min(max(position, int64_t{0}), p.max_positions - 1);
  const int64_t column = position * kIndexerRopeDim + lane * (kChunk / 2);
  float cos[4], sin[4];
  LoadFour(p.cos_sin, p.cos_sin_dtype, column, kAligned, cos);
  LoadFour(p.cos_sin, p.cos_sin_dtype, column + kIndexerRopeDim / 2, kAligned, sin);
  PdlLaunchDependents();
#pragma unroll
  for (int i = 0; i < kHeads; ++i) Rotate(cos, sin, x[i].rotated);

  if constexpr (kQuant == IndexerQuant::kMxfp4) {
    StoreMxfp4(p, x, row, heads);
  } else {
    weight = Mul(weight, StoreFp8(p, x, row, heads));
  }
  if (lane < heads) {
    p.weights_out[row + lane] = Mul(Mul(weight, p.softmax_scale), p.head_scale);
  }
}

}  // namespace

cudaError_t LaunchIndexerQRopeQuant(const IndexerQParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_heads == 0) return cudaSuccess;
  const int64_t groups = (p.num_heads + int64_t{kHeads} - 1) / kHeads;
  if (p.num_tokens > (std::numeric_limits<int32_t>::max() - kThreads) / groups) {
    return cudaErrorInvalidValue;  // half a TiB of queries
  }
  QueryGrid grid;
  grid.groups = Divisor(static_cast<uint32_t>(groups));
  grid.count = static_cast<uint32_t>(p.num_tokens * groups);
  const bool aligned = IsAligned(p.q, 16) && p.q_token_stride % kChunk == 0 &&
                       p.q_head_stride % kChunk == 0 && IsAligned(p.cos_sin, 16);
  const dim3 ctas((grid.count + kThreads / kLanes - 1) / (kThreads / kLanes));
  cudaError_t status = cudaSuccess;
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4>(p.quant, "quant", [&](auto quant) {
    constexpr IndexerQuant kQuant = decltype(quant)::value;
    const auto kernel = aligned ? QueryKernel<kQuant, true> : QueryKernel<kQuant, false>;
    status = LaunchPdl(kernel, ctas, dim3(kThreads), stream, p, grid);
  });
  return status;
}

}  // namespace fastattn::cuda
