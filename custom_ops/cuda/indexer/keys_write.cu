// indexer_k_write_cache. Sixteen lanes hold a key, 8 channels each.
#include "common/dispatch.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/e2m1.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/indexer/encode.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kLanes = kIndexerHeadDim / kChunk;  // of a key
constexpr int kTokens = kThreads / kLanes;        // of a CTA

// Bytes that a lane stores: its codes, and (the first lane of a key) the scales.
template <IndexerQuant kQuant>
struct Encoded {
  uint32_t codes[kQuant == IndexerQuant::kFp8 ? 2 : 1];
  uint32_t scales;
};

template <DType kIn>
__device__ __forceinline__ Encoded<IndexerQuant::kFp8> EncodeKeyFp8(const Raw<kIn>& raw,
                                                                    IndexerScaleRule rule) {
  float x[kChunk];
  Unpack<kIn>(raw, x);
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) amax = max(amax, AbsBits(x[i]));
  amax = LanesMax<kLanes>(amax);
  const bool pow2 = rule == IndexerScaleRule::kPow2;
  const float scale = pow2 ? PowerOfTwoFp8Scale(amax) : IndexerAmaxScale(amax);
  const float inverse = pow2 ? PowerOfTwoInverse(scale) : Div(1.0f, scale);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = Mul(x[i], inverse);
  return {{PackCodes<DType::kE4M3>(x[0], x[1], x[2], x[3]),
           PackCodes<DType::kE4M3>(x[4], x[5], x[6], x[7])},
          FloatBits(scale)};
}

template <DType kIn>
__device__ __forceinline__ Encoded<IndexerQuant::kMxfp4> EncodeKeyMxfp4(const Raw<kIn>& raw) {
  constexpr int kBlockLanes = kMxBlock / kChunk;
  static_assert(kLanes == 4 * kBlockLanes, "four exponents a key");
  float x[kChunk];
  Unpack<kIn>(raw, x);
  float amax = 0.0f;  // fmaxf passes over a NaN
#pragma unroll
  for (int i = 0; i < kChunk; ++i) amax = fmaxf(amax, fabsf(x[i]));
  const uint8_t byte = MxScaleByte(LanesMax<kBlockLanes>(FloatBits(amax)));
  const float inverse = UE8M0Inverse(byte);
  Encoded<IndexerQuant::kMxfp4> encoded;
  if constexpr (kIn == DType::kBFloat16) {
    encoded.codes[0] = PackE2M1OfBf16x8(raw.low, __byte_perm(FloatBits(inverse), 0, 0x3232));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = Mul(x[i], inverse);
    encoded.codes[0] = PackE2M1x8<kFitsHalf<kIn>>(x);
  }
  const int lane = threadIdx.x % kLanes;
  uint32_t bytes = static_cast<uint32_t>(byte) << (8 * (lane / kBlockLanes));
  bytes |= __shfl_xor_sync(kFullWarp, bytes, kBlockLanes);
  bytes |= __shfl_xor_sync(kFullWarp, bytes, 2 * kBlockLanes);
  encoded.scales = bytes;
  return encoded;
}

// Whether addresses suit vectors: keys 16 bytes, codes 8, codes and scales 4.
struct Alignment {
  bool keys, pairs, words;
};

template <IndexerQuant kQuant, DType kIn>
__global__ void __launch_bounds__(kThreads)
    WriteKernel(const __grid_constant__ IndexerKWriteParams p, Alignment aligned) {
  const int lane = threadIdx.x % kLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
  const bool inside = token < p.num_tokens;
  const int64_t element = token * p.key_stride + lane * kChunk;
  PdlWait();
  const int64_t slot = inside ? p.slots.At(token) : -1;
  const Raw<kIn> raw = aligned.keys ? LoadRaw<kIn>(p.key, element, inside)
                                    : LoadRawUnaligned<kIn>(p.key, element, inside);
  PdlLaunchDependents();
  Encoded<kQuant> encoded;
  if constexpr (kQuant == IndexerQuant::kFp8) {
    encoded = EncodeKeyFp8<kIn>(raw, p.scale_rule);
  } else {
    encoded = EncodeKeyMxfp4<kIn>(raw);
  }
  if (slot < 0) return;
  int64_t page, row;
  SplitSlot(slot, p.pages.page_size, &page, &row);
  if (page >= p.pages.num_pages) return;
  constexpr int kCodeBytes = PageFormatOf(kQuant).code_bytes;
  uint8_t* first = p.cache + page * p.pages.page_stride;
  uint8_t* codes = first + row * kCodeBytes + lane * (kCodeBytes / kLanes);
  if constexpr (kQuant == IndexerQuant::kFp8) {
    if (aligned.pairs) {
      *reinterpret_cast<uint2*>(codes) = make_uint2(encoded.codes[0], encoded.codes[1]);
    } else {
      StoreWord(codes, encoded.codes[0], aligned.words);
      StoreWord(codes + 4, encoded.codes[1], aligned.words);
    }
  } else {
    StoreWord(codes, encoded.codes[0], aligned.words);
  }
  if (lane == 0) {
    StoreWord(first + p.pages.page_size * kCodeBytes + 4 * row, encoded.scales, aligned.words);
  }
}

}  // namespace

cudaError_t LaunchIndexerKWrite(const IndexerKWriteParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.pages.num_pages == 0) return cudaSuccess;
  const dim3 ctas(GridSize((p.num_tokens + kTokens - 1) / kTokens));
  Alignment aligned;
  aligned.keys =
      IsAligned(p.key, 16) && p.key_stride * static_cast<int64_t>(SizeOf(p.key_dtype)) % 16 == 0;
  aligned.pairs = IsAligned(p.cache, 8) && p.pages.page_stride % 8 == 0;
  aligned.words = IsAligned(p.cache, 4) && p.pages.page_stride % 4 == 0;
  cudaError_t status = cudaSuccess;
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4>(p.pages.quant, "quant", [&](auto quant) {
    dispatch<DType::kBFloat16, DType::kFloat16, DType::kFloat32>(
        p.key_dtype, "key dtype", [&](auto dtype) {
          status = LaunchPdl(WriteKernel<decltype(quant)::value, decltype(dtype)::value>, ctas,
                             dim3(kThreads), stream, p, aligned);
        });
  });
  return status;
}

}  // namespace fastattn::cuda
