// indexer_k_write_cache. Eight lanes hold a key, 16 channels each, so that what is done once a lane
// (its slot, its page, addresses) and once a key is spread over many bytes.
#include <algorithm>

#include "common/dispatch.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/divisor.cuh"
#include "cuda/common/e2m1.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/prefetch.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/common/unaligned.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/indexer/encode.cuh"
#include "cuda/indexer/launch.h"

namespace fastattn::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kChunks = 2;                                    // of a lane
constexpr int kLanes = kIndexerHeadDim / (kChunks * kChunk);  // of a key
constexpr int kTokens = kThreads / kLanes;                    // of a CTA at once

// Channels of a lane, as they were loaded.
template <DType kIn>
struct LaneKey {
  Raw<kIn> chunks[kChunks];
};

// Bytes that a lane stores: its codes, and (the first lane of a key) the scales.
template <IndexerQuant kQuant>
struct Encoded {
  uint32_t codes[kQuant == IndexerQuant::kFp8 ? 4 : 2];
  uint32_t scales;
};

// The larger of two pairs of magnitudes of bf16 or fp16. Their bits are ordered as integers, with
// NaN above all; or a NaN is passed over.
template <DType kIn, bool kSkipNaN>
__device__ __forceinline__ uint32_t MaxPair(uint32_t a, uint32_t b) {
  if constexpr (!kSkipNaN) {
    return __vmaxu2(a, b);
  } else if constexpr (kIn == DType::kBFloat16) {
    return Bf162Bits(__hmax2(AsBf162(a), AsBf162(b)));
  } else {
    return HalfBits(__hmax2(AsHalf2(a), AsHalf2(b)));
  }
}

// Bits in fp32 of the largest magnitude of a lane's channels.
template <DType kIn, bool kSkipNaN>
__device__ __forceinline__ uint32_t LaneAmax(const LaneKey<kIn>& key) {
  if constexpr (kIn == DType::kFloat32) {
    float most = 0.0f;
    uint32_t bits = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float x[kChunk];
      Unpack<kIn>(key.chunks[c], x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        most = fmaxf(most, fabsf(x[i]));  // passes over a NaN
        bits = max(bits, AbsBits(x[i]));
      }
    }
    return kSkipNaN ? FloatBits(most) : bits;
  } else {
    uint32_t pair = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint4 words = key.chunks[c].low;
      const uint32_t four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) pair = MaxPair<kIn, kSkipNaN>(pair, four[i] & 0x7FFF7FFFu);
    }
    const uint32_t most = max(pair & 0xFFFFu, pair >> 16);
    if constexpr (kIn == DType::kBFloat16) return most << 16;
    return FloatBits(__half2float(__ushort_as_half(static_cast<uint16_t>(most))));
  }
}

// `kDivides`: kAmaxDiv, whose division takes many instructions a channel.
template <DType kIn, bool kDivides>
__device__ __forceinline__ Encoded<IndexerQuant::kFp8> EncodeKeyFp8(const LaneKey<kIn>& key,
                                                                    IndexerScaleRule rule) {
  const uint32_t amax = LanesMax<kLanes>(LaneAmax<kIn, false>(key));
  const bool pow2 = !kDivides && rule == IndexerScaleRule::kPow2;
  const float scale = pow2 ? PowerOfTwoFp8Scale(amax) : IndexerAmaxScale(amax);
  const float inverse = pow2 ? PowerOfTwoInverse(scale) : Div(1.0f, scale);
  Encoded<IndexerQuant::kFp8> encoded;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float x[kChunk];
    Unpack<kIn>(key.chunks[c], x);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = kDivides ? Div(x[i], scale) : Mul(x[i], inverse);
    encoded.codes[2 * c] = PackCodes<DType::kE4M3>(x[0], x[1], x[2], x[3]);
    encoded.codes[2 * c + 1] = PackCodes<DType::kE4M3>(x[4], x[5], x[6], x[7]);
  }
  encoded.scales = FloatBits(scale);
  return encoded;
}

template <DType kIn>
__device__ __forceinline__ Encoded<IndexerQuant::kMxfp4> EncodeKeyMxfp4(const LaneKey<kIn>& key) {
  constexpr int kBlockLanes = kMxBlock / (kChunks * kChunk);
  static_assert(kLanes == 4 * kBlockLanes, "four exponents a key");
  const uint8_t byte = MxScaleByte(LanesMax<kBlockLanes>(LaneAmax<kIn, true>(key)));
  const float inverse = UE8M0Inverse(byte);
  Encoded<IndexerQuant::kMxfp4> encoded;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if constexpr (kIn == DType::kBFloat16) {
      encoded.codes[c] =
          PackE2M1OfBf16x8(key.chunks[c].low, __byte_perm(FloatBits(inverse), 0, 0x3232));
    } else {
      float x[kChunk];
      Unpack<kIn>(key.chunks[c], x);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = Mul(x[i], inverse);
      encoded.codes[c] = PackE2M1x8<kFitsHalf<kIn>>(x);
    }
  }
  const int lane = threadIdx.x % kLanes;
  uint32_t bytes = static_cast<uint32_t>(byte) << (8 * (lane / kBlockLanes));
  bytes |= __shfl_xor_sync(kFullWarp, bytes, kBlockLanes);
  bytes |= __shfl_xor_sync(kFullWarp, bytes, 2 * kBlockLanes);
  encoded.scales = bytes;
  return encoded;
}

template <IndexerQuant kQuant, DType kIn, bool kDivides>
__device__ __forceinline__ Encoded<kQuant> EncodeKey(const LaneKey<kIn>& key,
                                                     IndexerScaleRule rule) {
  if constexpr (kQuant == IndexerQuant::kFp8) {
    return EncodeKeyFp8<kIn, kDivides>(key, rule);
  } else {
    return EncodeKeyMxfp4<kIn>(key);
  }
}

// Whether addresses suit vectors; `words`: those of the cache suit at least four bytes.
struct Alignment {
  bool keys, words;
};

// `from`: the lane's channels. Plain loads: see prefetch.cuh.
template <DType kIn, bool kAligned>
__device__ __forceinline__ LaneKey<kIn> LoadKey(const uint8_t* from, bool inside,
                                                bool keys_aligned) {
  constexpr int kVectors = static_cast<int>(SizeOf(kIn)) / 2;  // of a chunk
  constexpr int kElements = kIn == DType::kFloat32 ? 4 : 8;    // of a vector
  LaneKey<kIn> key = {};
  if (!inside) return key;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint8_t* at = from + (c * kVectors + v) * 16;
      uint4& vector = v == 0 ? key.chunks[c].low : key.chunks[c].high;
      if (kAligned || keys_aligned) {
        vector = *reinterpret_cast<const uint4*>(at);
        continue;
      }
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if constexpr (kIn == DType::kFloat32) {
          words[i] = reinterpret_cast<const uint32_t*>(at)[i];
        } else {
          const uint32_t half = reinterpret_cast<const uint16_t*>(at)[i];
          words[i / 2] |= half << (16 * (i % 2));
        }
      }
      vector = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
  return key;
}

// Page of a slot, whose row is what is left; slots of a pool of less than 2^31 without a division.
__device__ __forceinline__ int64_t PageOfSlot(const IndexerPages& pages, const Divisor& page_size,
                                              int64_t slot) {
  if (slot < 0x7FFFFFFF) return page_size.Quotient(static_cast<uint32_t>(slot));
  return slot / pages.page_size;
}

template <IndexerQuant kQuant, bool kAligned>
__device__ __forceinline__ void StoreKey(const IndexerKWriteParams& p, int64_t page, int64_t row,
                                         int lane, const Encoded<kQuant>& encoded, bool words) {
  constexpr int kCodeBytes = PageFormatOf(kQuant).code_bytes;
  constexpr int kWords = kCodeBytes / kLanes / 4;
  uint8_t* first = p.cache + page * p.pages.page_stride;
  uint8_t* codes = first + row * kCodeBytes + lane * (4 * kWords);
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) StoreWord(codes + 4 * i, encoded.codes[i], words);
  } else if constexpr (kQuant == IndexerQuant::kFp8) {
    *reinterpret_cast<uint4*>(codes) =
        make_uint4(encoded.codes[0], encoded.codes[1], encoded.codes[2], encoded.codes[3]);
  } else {
    *reinterpret_cast<uint2*>(codes) = make_uint2(encoded.codes[0], encoded.codes[1]);
  }
  if (lane == 0) {
    uint8_t* scales = first + p.pages.page_size * kCodeBytes + 4 * row;
    StoreWord(scales, encoded.scales, kAligned || words);
  }
}

// Asks for a key and its slot ahead of PdlWait.
template <DType kIn>
__device__ __forceinline__ void PrefetchKey(const IndexerKWriteParams& p, const uint8_t* key,
                                            int64_t token, int lane) {
  constexpr int kLines = kIndexerHeadDim * static_cast<int>(SizeOf(kIn)) / 128;
  static_assert(kLines < kLanes);
  if (lane < kLines) PrefetchL2(key + lane * 128);
  if (lane == kLines) PrefetchIndex(p.slots, token);
}

template <IndexerQuant kQuant, DType kIn, bool kAligned, bool kDivides>
__global__ void __launch_bounds__(kThreads)
    WriteKernel(const __grid_constant__ IndexerKWriteParams p, Alignment aligned,
                Divisor page_size) {
  const int lane = threadIdx.x % kLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
  const bool inside = token < p.num_tokens;
  constexpr int kSize = static_cast<int>(SizeOf(kIn));
  const uint8_t* row = static_cast<const uint8_t*>(p.key) + token * p.key_stride * kSize;
  if (inside) PrefetchKey<kIn>(p, row, token, lane);
  PdlWait();
  const int64_t slot = inside ? p.slots.At(token) : -1;
  const LaneKey<kIn> key =
      LoadKey<kIn, kAligned>(row + lane * (kChunks * kChunk * kSize), inside, aligned.keys);
  PdlLaunchDependents();
  const Encoded<kQuant> encoded = EncodeKey<kQuant, kIn, kDivides>(key, p.scale_rule);
  if (slot < 0) return;
  const int64_t page = PageOfSlot(p.pages, page_size, slot);
  if (page >= p.pages.num_pages) return;
  StoreKey<kQuant, kAligned>(p, page, slot - page * p.pages.page_size, lane, encoded,
                             aligned.words);
}

template <IndexerQuant kQuant, DType kIn, bool kAligned, bool kDivides>
cudaError_t LaunchKernel(const IndexerKWriteParams& p, Alignment aligned, cudaStream_t stream) {
  const Divisor page_size(static_cast<uint32_t>(std::min<int64_t>(p.pages.page_size, 0x7FFFFFFF)));
  return LaunchPdl(WriteKernel<kQuant, kIn, kAligned, kDivides>,
                   dim3(GridSize((p.num_tokens + kTokens - 1) / kTokens)), dim3(kThreads), stream,
                   p, aligned, page_size);
}

template <IndexerQuant kQuant, DType kIn, bool kAligned>
cudaError_t LaunchVariant(const IndexerKWriteParams& p, Alignment aligned, cudaStream_t stream) {
  if constexpr (kQuant == IndexerQuant::kFp8) {
    if (p.scale_rule == IndexerScaleRule::kAmaxDiv) {
      return LaunchKernel<kQuant, kIn, kAligned, true>(p, aligned, stream);
    }
  }
  return LaunchKernel<kQuant, kIn, kAligned, false>(p, aligned, stream);
}

}  // namespace

cudaError_t LaunchIndexerKWrite(const IndexerKWriteParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.pages.num_pages == 0) return cudaSuccess;
  Alignment aligned;
  aligned.keys =
      IsAligned(p.key, 16) && p.key_stride * static_cast<int64_t>(SizeOf(p.key_dtype)) % 16 == 0;
  aligned.words = IsAligned(p.cache, 4) && p.pages.page_stride % 4 == 0;
  const bool all = aligned.keys && IsAligned(p.cache, 16) && p.pages.page_stride % 16 == 0;
  cudaError_t status = cudaSuccess;
  dispatch<IndexerQuant::kFp8, IndexerQuant::kMxfp4>(p.pages.quant, "quant", [&](auto quant) {
    dispatch<DType::kBFloat16, DType::kFloat16, DType::kFloat32>(
        p.key_dtype, "key dtype", [&](auto dtype) {
          constexpr IndexerQuant kQuant = decltype(quant)::value;
          constexpr DType kIn = decltype(dtype)::value;
          status = all ? LaunchVariant<kQuant, kIn, true>(p, aligned, stream)
                       : LaunchVariant<kQuant, kIn, false>(p, aligned, stream);
        });
  });
  return status;
}

}  // namespace fastattn::cuda
