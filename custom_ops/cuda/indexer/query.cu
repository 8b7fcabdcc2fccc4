// indexer_q_rope_quant. A head lies in half a warp, 8 channels a lane, and a half warp converts
// kHeads heads of a token at once: so many 16-byte loads are in flight, and among neighbouring
// lanes the codes of several heads are traded until every store is 16 bytes, too.
#include <cuda_bf16.h>

#include "common/dispatch.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/e2m1.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/indexer/encode.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kHeads = 4;
constexpr int kLanes = kIndexerHeadDim / kChunk;
constexpr int kFirstRopeLane = (kIndexerHeadDim - kIndexerRopeDim) / kChunk;

using RawBf16 = Raw<DType::kBFloat16>;

struct QueryGrid {
  int groups;  // of kHeads heads a token
  bool q_aligned;
  bool table_aligned;
};

// Rotates the head's last channels and rounds them to bf16 again; the others are bf16 already.
__device__ __forceinline__ void RotateHead(const float (&cos)[4], const float (&sin)[4],
                                           RawBf16& raw) {
  float x[kChunk];
  Unpack<DType::kBFloat16>(raw, x);
#pragma unroll
  for (int i = 0; i < 4; ++i) RotatePair(cos[i], sin[i], x[2 * i], x[2 * i + 1]);
  raw.low =
      make_uint4(PackPair<DType::kBFloat16>(x[0], x[1]), PackPair<DType::kBFloat16>(x[2], x[3]),
                 PackPair<DType::kBFloat16>(x[4], x[5]), PackPair<DType::kBFloat16>(x[6], x[7]));
}

__device__ __forceinline__ __nv_bfloat162 AbsBf162(uint32_t bits) {
  bits &= 0x7FFF7FFFu;
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}

// Largest |x| among a lane's even and among its odd channels, as two bf16. kNaNWins: a NaN is the
// largest; otherwise it does not count.
template <bool kNaNWins>
__device__ __forceinline__ uint32_t LaneAmax(const RawBf16& raw) {
  if constexpr (kNaNWins) {
    return __vmaxu2(__vmaxu2(raw.low.x & 0x7FFF7FFFu, raw.low.y & 0x7FFF7FFFu),
                    __vmaxu2(raw.low.z & 0x7FFF7FFFu, raw.low.w & 0x7FFF7FFFu));
  } else {
    __nv_bfloat162 amax = __hmax2(AbsBf162(raw.low.x), AbsBf162(raw.low.y));
    amax = __hmax2(amax, __hmax2(AbsBf162(raw.low.z), AbsBf162(raw.low.w)));
    amax = __hmax2(amax, AbsBf162(0));
    return *reinterpret_cast<const uint32_t*>(&amax);
  }
}

// fp32 bits of the amax of each head over kSpan lanes, two heads in one word on the way.
template <bool kNaNWins, int kSpan>
__device__ __forceinline__ void HeadAmax(const RawBf16 (&raw)[kHeads], uint32_t (&amax)[kHeads]) {
#pragma unroll
  for (int i = 0; i < kHeads; i += 2) {
    const uint32_t a = LaneAmax<kNaNWins>(raw[i]), b = LaneAmax<kNaNWins>(raw[i + 1]);
    const uint32_t both =
        LanesMax2<kSpan>(__vmaxu2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632)));
    amax[i] = both << 16;
    amax[i + 1] = both & 0xFFFF0000u;
  }
}

// Codes of the heads to row, row + 1, ... and their scales; lane i < kHeads returns head i's.
__device__ __forceinline__ float StoreFp8(const IndexerQParams& p, const RawBf16 (&raw)[kHeads],
                                          int64_t row, int heads) {
  const int lane = threadIdx.x % kLanes;
  uint32_t amax[kHeads];
  HeadAmax<true, kLanes>(raw, amax);
  float own_scale = 0.0f;
  uint32_t low[kHeads], high[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const float scale = PowerOfTwoFp8Scale(amax[i]);
    if (lane == i) own_scale = scale;
    const float inverse = PowerOfTwoInverse(scale);
    float x[kChunk];
    Unpack<DType::kBFloat16>(raw[i], x);
#pragma unroll
    for (int c = 0; c < kChunk; ++c) x[c] = Mul(x[c], inverse);
    low[i] = PackCodes<DType::kE4M3>(x[0], x[1], x[2], x[3]);
    high[i] = PackCodes<DType::kE4M3>(x[4], x[5], x[6], x[7]);
  }
#pragma unroll
  for (int i = 0; i < kHeads; i += 2) {
    SwapHalves(low[i], low[i + 1], 1);
    SwapHalves(high[i], high[i + 1], 1);
    const int head = i + lane % 2;
    if (head < heads) {
      *reinterpret_cast<uint4*>(p.codes + (row + head) * kIndexerHeadDim + lane / 2 * 16) =
          make_uint4(low[i], high[i], low[i + 1], high[i + 1]);
    }
  }
  if (lane < heads) static_cast<float*>(p.scales)[row + lane] = own_scale;
  return own_scale;
}

__device__ __forceinline__ void StoreMxfp4(const IndexerQParams& p, const RawBf16 (&raw)[kHeads],
                                           int64_t row, int heads) {
  const int lane = threadIdx.x % kLanes;
  uint32_t amax[kHeads];
  HeadAmax<false, kMxBlock / kChunk>(raw, amax);
  uint32_t codes[kHeads];
  uint32_t bytes = 0;  // exponent of this lane's block in head i in byte i
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const uint8_t byte = MxScaleByte(amax[i]);
    bytes |= static_cast<uint32_t>(byte) << (8 * i);
    const float inverse = UE8M0Inverse(byte);
    float x[kChunk];
    Unpack<DType::kBFloat16>(raw[i], x);
#pragma unroll
    for (int c = 0; c < kChunk; ++c) x[c] = Mul(x[c], inverse);
    codes[i] = PackE2M1x8<true>(x);
  }
  static_assert(kHeads == 4, "a quad of lanes trades the words of 4 heads");
  TransposeQuad(codes);
  const int head = lane % 4;
  if (head < heads) {
    *reinterpret_cast<uint4*>(p.codes + (row + head) * (kIndexerHeadDim / 2) + lane / 4 * 16) =
        make_uint4(codes[0], codes[1], codes[2], codes[3]);
  }
  uint32_t scales = 0;  // of head `head`: block b in byte b
#pragma unroll
  for (int b = 0; b < kIndexerHeadDim / kMxBlock; ++b) {
    const uint32_t of_block = __shfl_sync(0xFFFFFFFFu, bytes, (threadIdx.x & 16) + 4 * b);
    scales |= (of_block >> (8 * head) & 0xFFu) << (8 * b);
  }
  if (lane < heads) static_cast<uint32_t*>(p.scales)[row + lane] = scales;
}

template <IndexerQuant kQuant>
__global__ void __launch_bounds__(kThreads)
    QueryKernel(const __grid_constant__ IndexerQParams p, QueryGrid grid) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int64_t token = index / grid.groups;
  const int first_head = static_cast<int>(index % grid.groups) * kHeads;
  const int heads = token < p.num_tokens ? min(kHeads, p.num_heads - first_head) : 0;
  const int lane = threadIdx.x % kLanes;

  RawBf16 raw[kHeads];
  const int64_t element = token * p.q_token_stride + first_head * p.q_head_stride + lane * kChunk;
  if (grid.q_aligned) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      raw[i] = LoadRaw<DType::kBFloat16>(p.q, element + i * p.q_head_stride, i < heads);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      raw[i] = LoadRawUnaligned<DType::kBFloat16>(p.q, element + i * p.q_head_stride, i < heads);
    }
  }
  const int64_t row = token * p.num_heads + first_head;
  float weight = 0.0f;
  if (lane < heads) weight = LoadScale(p.weights, p.weights_dtype, row + lane);

  if (heads > 0 && lane >= kFirstRopeLane) {
    const int64_t position = min(max(p.positions.At(token), int64_t{0}), p.max_positions - 1);
    const int64_t column = position * kIndexerRopeDim + (lane - kFirstRopeLane) * (kChunk / 2);
    float cos[4], sin[4];
    LoadFour(p.cos_sin, p.cos_sin_dtype, column, grid.table_aligned, cos);
    LoadFour(p.cos_sin, p.cos_sin_dtype, column + kIndexerRopeDim / 2, grid.table_aligned, sin);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) RotateHead(cos, sin, raw[i]);
  }
  __syncwarp();
  if constexpr (kQuant == IndexerQuant::kMxfp4) {
    StoreMxfp4(p, raw, row, heads);
  } else {
    weight = Mul(weight, StoreFp8(p, raw, row, heads));
  }
  if (lane < heads) {
    p.weights_out[row + lane] = Mul(Mul(weight, p.softmax_scale), p.head_scale);
  }
}

}  // namespace

cudaError_t LaunchIndexerQRopeQuant(const IndexerQParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.num_heads == 0) return cudaSuccess;
  QueryGrid grid;
  grid.groups = (p.num_heads + kHeads - 1) / kHeads;
  grid.q_aligned =
      IsAligned(p.q, 16) && p.q_token_stride % kChunk == 0 && p.q_head_stride % kChunk == 0;
  grid.table_aligned = IsAligned(p.cos_sin, 16);
  const int64_t threads = p.num_tokens * grid.groups * kLanes;
  const auto ctas = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4>(p.quant, "quant", [&](auto quant) {
    QueryKernel<decltype(quant)::value><<<ctas, kThreads, 0, stream>>>(p, grid);
  });
  return cudaGetLastError();
}

}  // namespace fastattn::cuda
