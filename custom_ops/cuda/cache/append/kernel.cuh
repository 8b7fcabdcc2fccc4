// Dequantises cached blocks into contiguous K and V.
//
// One CTA handles one block (64 tokens) of one KV head, K and V, or one of both where they have
// other numbers of channels or other codes. Each thread loads 16-byte pieces of codes, all of them
// before it uses the first.
//
// K: a piece is 16 channels of one token, which its thread converts and stores.
// V: a piece is 16 tokens of one channel. A thread takes the pieces of 4 neighbouring channels,
//    transposes 4x4 bytes in registers (8 prmt per 16 bytes) and writes words of 4 channels to
//    shared memory, token-major; the block is then read back as 16 channels of one token.
// Stores: 16 codes become 32 bytes, two 16-byte stores. Neighbouring lanes trade halves first, so
//    that one store instruction fills whole 32-byte sectors.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/dispatch.h"
#include "common/group_scale.h"
#include "common/head_dims.h"
#include "common/numeric.h"
#include "common/static_scales.h"
#include "common/types.h"
#include "cuda/cache/append/launch.h"
#include "cuda/cache/shared/append_tile.cuh"
#include "cuda/cache/shared/block_pieces.cuh"
#include "cuda/cache/shared/nibble_values.cuh"
#include "cuda/cache/shared/seq_tiles.cuh"
#include "cuda/common/bytes.cuh"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "formats/kv_format.h"

namespace fastattn::cuda {

// Threads of a CTA: a whole number of tokens' pieces.
constexpr int AppendThreads(int head_dim) { return head_dim % 3 == 0 ? 96 : 128; }

// kCode: of K, and kValueCode: of V.
template <DType kOut_, DType kCode_, Scales kScales_, CacheLayout kLayout_, int kHeadDim_,
          DType kValueCode_ = kCode_>
struct AppendTraits {
  static constexpr DType kOut = kOut_;
  static constexpr DType kCode = kCode_;
  using Side = SideFormat<kCode, kScales_>;
  static constexpr bool kDynamicQuant = Side::kDynamic;
  static constexpr CacheLayout kLayout = kLayout_;
  static constexpr int kHeadDim = kHeadDim_;  // of K
  // The same for V.
  static constexpr bool kOwnValue = ValueDim(kHeadDim) != kHeadDim || kValueCode_ != kCode;
  using Value = AppendTraits<kOut, kValueCode_, kScales_, kLayout, ValueDim(kHeadDim)>;

  // FastDeploy adds 128 to int8 codes: flip the top bit of each byte.
  static constexpr uint32_t kBias =
      kCode == DType::kInt8 && kLayout == CacheLayout::kFastDeploy ? 0x80808080u : 0u;

  static constexpr bool kNibbles = Side::kNibbles;
  // Scales of a piece of 16 bytes, and of a token.
  static constexpr int kPieceScales = Side::kGrouped ? 32 / std::max(Side::kGroup, 1) : 1;
  static constexpr int kTokenScales = Side::TokenScales(kHeadDim);
  static constexpr int kRow = kHeadDim / CodesPerByte(kCode);  // bytes of a token
  static constexpr int kThreads = AppendThreads(kHeadDim);
  static constexpr int kPiecesPerToken = kRow / 16;
  static constexpr int kPieces = kBlockSize * kPiecesPerToken / kThreads;  // per thread
  // V: a thread has four channels of each round.
  static constexpr int kRounds = (kRow + kThreads - 1) / kThreads;
};

// Loads the static scales of channels [channel, channel + 16) of a head; they are equal where the
// scale is per tensor or per head.
__device__ __forceinline__ void LoadStaticScales(const void* scales, DType dtype,
                                                 ScaleScheme granularity, int head, int head_dim,
                                                 int channel, float (&out)[16]) {
  if (granularity == ScaleScheme::kChannel) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      out[i] = LoadScale(scales, dtype, StaticScaleIndex(granularity, head, channel + i, head_dim));
    }
  } else {
    const float scale =
        LoadScale(scales, dtype, StaticScaleIndex(granularity, head, channel, head_dim));
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i] = scale;
  }
}

// Byte offsets in a plane of the K piece with channels [16 g, +16) of token r, and of the V piece
// with tokens [16 g, +16) of channel d (of 4-bit codes: 32 channels, and of two). The rows of a
// plane in the fastattn layout are `row_stride` bytes apart; planes in the other layout are
// contiguous.
template <typename Traits>
__device__ __forceinline__ int64_t KeyPieceIn(int64_t row_stride, int r, int g) {
  if constexpr (Traits::kLayout == CacheLayout::kFastattn) return r * row_stride + g * 16;
  return KeyPiece<Traits::kLayout, Traits::kRow>(r, g);
}

template <typename Traits>
__device__ __forceinline__ int64_t ValuePieceIn(int64_t row_stride, int d, int g) {
  if constexpr (Traits::kLayout == CacheLayout::kFastattn) return d * row_stride + g * 16;
  return ValuePiece<Traits::kLayout, Traits::kRow>(d, g);
}

// Dequantises 16 codes (channels [16 g, 16 g + 16) of a token) and stores them in the token's
// channels at `out`. Two neighbouring lanes hold g and g + 1 of the same token, and both take part.
template <typename Traits>
__device__ __forceinline__ void StorePiece(uint4 codes, const float (&static_scales)[16],
                                           float token_scale, uint16_t* out, int g, bool active) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t pairs[8];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[4];
    CodesToFloat<Traits::kCode>(words[w], x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] *= Traits::kDynamicQuant ? token_scale : static_scales[4 * w + i];
    }
    pairs[2 * w] = PackPair<Traits::kOut>(x[0], x[1]);
    pairs[2 * w + 1] = PackPair<Traits::kOut>(x[2], x[3]);
  }
  // The even lane gives its high half for the odd lane's low half.
  const bool odd = g & 1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t sent = odd ? pairs[i] : pairs[4 + i];
    const uint32_t received = __shfl_xor_sync(kFullWarp, sent, 1);
    if (odd) {
      pairs[i] = received;
    } else {
      pairs[4 + i] = received;
    }
  }
  if (!active) return;
  uint4* halves = reinterpret_cast<uint4*>(out + (g & ~1) * 16) + (odd ? 1 : 0);
  halves[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  halves[2] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
}

template <typename Traits>
using PieceScales = float[Traits::kPieceScales];

// The n-th scale of piece g of token r of a block whose first scale is `scales`[plane].
template <typename Traits>
__device__ __forceinline__ float PieceScale(const PagedCache& cache, const void* scales,
                                            int64_t plane, int r, int g, int n) {
  if constexpr (Traits::Side::kGrouped) {
    return GroupScale<Traits::Side::kScaleType>::Value(static_cast<const uint8_t*>(
        scales)[plane + r * Traits::kTokenScales + g * Traits::kPieceScales + n]);
  } else {
    return LoadScale(scales, cache.scale_dtype, plane + r);
  }
}

// The same of 32 codes of 4 bits: channels [32 g, 32 g + 32).
template <typename Traits>
__device__ __forceinline__ void StoreNibblePiece(uint4 codes, const PieceScales<Traits>& scales,
                                                 uint16_t* out, int g, bool active) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t pairs[4][4];  // of a word's 8 channels
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[8];
    NibblesToFloat<Traits::kCode>(words[w], x);
    const float scale = scales[w * Traits::kPieceScales / 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[w][i] = PackPair<Traits::kOut>(x[2 * i] * scale, x[2 * i + 1] * scale);
    }
  }
  if constexpr (Traits::kPiecesPerToken % 2 != 0) {  // no lane to trade with
    if (!active) return;
    uint4* to = reinterpret_cast<uint4*>(out + g * 32);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      to[w] = make_uint4(pairs[w][0], pairs[w][1], pairs[w][2], pairs[w][3]);
    }
    return;
  }
  // The even lane gives its odd words for the odd lane's even ones.
  const bool odd = g & 1;
#pragma unroll
  for (int w = 0; w < 4; w += 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t sent = odd ? pairs[w][i] : pairs[w + 1][i];
      const uint32_t received = __shfl_xor_sync(kFullWarp, sent, 1);
      if (odd) {
        pairs[w][i] = received;
      } else {
        pairs[w + 1][i] = received;
      }
    }
  }
  if (!active) return;
  // Words 0 and 2 are those of the even lane's piece now, 1 and 3 of the odd lane's.
  uint4* to = reinterpret_cast<uint4*>(out + (g & ~1) * 32) + (odd ? 1 : 0);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    to[w / 2 * 2 + w % 2 * 4] = make_uint4(pairs[w][0], pairs[w][1], pairs[w][2], pairs[w][3]);
  }
}

// Either, by the codes.
template <typename Traits>
__device__ __forceinline__ void StoreCodes(uint4 codes, const float (&static_scales)[16],
                                           const PieceScales<Traits>& scales, uint16_t* out, int g,
                                           bool active) {
  if constexpr (Traits::kNibbles) {
    StoreNibblePiece<Traits>(codes, scales, out, g, active);
  } else {
    StorePiece<Traits>(codes, static_scales, scales[0], out, g, active);
  }
}

// Converts and stores a thread's pieces; codes_of(i) are those of the i-th, of token tokens[i].
template <typename Traits, typename CodesOf>
__device__ __forceinline__ void StorePieces(CodesOf&& codes_of,
                                            const int (&tokens)[Traits::kPieces], int count,
                                            const float (&static_scales)[16],
                                            const PieceScales<Traits> (&scales)[Traits::kPieces],
                                            uint16_t* out, int64_t token_stride, int g) {
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    uint4 codes = codes_of(i);
    codes.x ^= Traits::kBias, codes.y ^= Traits::kBias;
    codes.z ^= Traits::kBias, codes.w ^= Traits::kBias;
    StoreCodes<Traits>(codes, static_scales, scales[i], out + tokens[i] * token_stride, g,
                       tokens[i] < count);
  }
}

// A tile's K, its V or both; kThreads threads.
template <typename Traits, bool kKeys, bool kValues>
__device__ __forceinline__ void GatherTile(const AppendCacheParams& p, const AppendTile& tile,
                                           int head) {
  constexpr int kHeadDim = Traits::kHeadDim, kRow = Traits::kRow;
  __shared__ TokenMajorTile<kRow> value_tile;
  const PagedCache& cache = p.cache;
  const int block = tile.block, count = tile.count;
  const uint8_t* key_codes =
      static_cast<const uint8_t*>(cache.key) + cache.key_strides.Plane(block, head);
  const uint8_t* value_codes =
      static_cast<const uint8_t*>(cache.value) + cache.value_strides.Plane(block, head);

  // All loads are issued before the first of them is used. They are no loads of constants (__ldg),
  // which the compiler might move in front of the wait for the kernel that writes the cache.
  const int tid = threadIdx.x;
  const int g = tid % Traits::kPiecesPerToken;  // channel group of K pieces and of stores
  int tokens_of_thread[Traits::kPieces];
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    tokens_of_thread[i] = KeyPieceOfThread<kRow, Traits::kThreads>(i).token;
  }
  uint4 k[Traits::kPieces];
#pragma unroll
  for (int i = 0; i < Traits::kPieces; ++i) {
    const int r = tokens_of_thread[i];
    k[i] = kKeys && r < count ? *reinterpret_cast<const uint4*>(
                                    key_codes + KeyPieceIn<Traits>(cache.key_strides.row, r, g))
                              : make_uint4(0, 0, 0, 0);
  }
  const int v_group = tid % 4;        // tokens [16 v_group, +16)
  const int v_channel = tid / 4 * 4;  // channels [v_channel, +4)
  const auto v_active = [&](int round) { return v_channel + round * Traits::kThreads < kRow; };
  uint4 v[Traits::kRounds][4];
#pragma unroll
  for (int round = 0; round < Traits::kRounds; ++round) {
    const int channel = v_channel + round * Traits::kThreads;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[round][i] = kValues && v_active(round)
                        ? *reinterpret_cast<const uint4*>(
                              value_codes +
                              ValuePieceIn<Traits>(cache.value_strides.row, channel + i, v_group))
                        : make_uint4(0, 0, 0, 0);
    }
  }
  PieceScales<Traits> k_scales[Traits::kPieces], v_scales[Traits::kPieces];
  float k_static[16], v_static[16];
  if constexpr (Traits::kDynamicQuant) {
#pragma unroll
    for (int i = 0; i < Traits::kPieces; ++i) {
      const int r = tokens_of_thread[i];
      const int64_t k_plane = cache.k_scale_strides.Plane(block, head);
      const int64_t v_plane = cache.v_scale_strides.Plane(block, head);
#pragma unroll
      for (int n = 0; n < Traits::kPieceScales; ++n) {
        k_scales[i][n] =
            kKeys && r < count ? PieceScale<Traits>(cache, cache.k_scales, k_plane, r, g, n) : 0.0f;
        v_scales[i][n] = kValues && r < count
                             ? PieceScale<Traits>(cache, cache.v_scales, v_plane, r, g, n)
                             : 0.0f;
      }
    }
  } else {
    if constexpr (kKeys) {
      LoadStaticScales(p.cache.k_scales, p.cache.scale_dtype, p.cache.k_granularity, head, kHeadDim,
                       g * 16, k_static);
    }
    if constexpr (kValues) {
      LoadStaticScales(p.cache.v_scales, p.cache.scale_dtype, p.cache.v_granularity, head, kHeadDim,
                       g * 16, v_static);
    }
  }

  // V is transposed on its way into shared memory.
#pragma unroll
  for (int round = 0; round < Traits::kRounds; ++round) {
    if (kValues && v_active(round)) {
      ScatterPieces(v[round], v_channel + round * Traits::kThreads, v_group, value_tile);
    }
  }

  // K is converted and stored while V's writes settle.
  if constexpr (kKeys) {
    const auto codes_of = [&](int i) {
      return Traits::kLayout == CacheLayout::kFastDeploy ? SlotsToOrder(k[i]) : k[i];
    };
    uint16_t* out = static_cast<uint16_t*>(p.key) + tile.out_token * p.key_token_stride;
    StorePieces<Traits>(codes_of, tokens_of_thread, count, k_static, k_scales,
                        out + static_cast<int64_t>(head) * kHeadDim, p.key_token_stride, g);
  }

  // V is read back by token, converted and stored.
  if constexpr (kValues) {
    __syncthreads();
    const auto codes_of = [&](int i) {
      const uint8_t* row = value_tile.codes + value_tile.Offset(tokens_of_thread[i]);
      return *reinterpret_cast<const uint4*>(row + g * 16);
    };
    uint16_t* out = static_cast<uint16_t*>(p.value) + tile.out_token * p.value_token_stride;
    StorePieces<Traits>(codes_of, tokens_of_thread, count, v_static, v_scales,
                        out + static_cast<int64_t>(head) * kHeadDim, p.value_token_stride, g);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(std::max(Traits::kThreads, Traits::Value::kThreads))
    AppendCacheKernel(const __grid_constant__ AppendCacheParams p) {
  constexpr int kCtas = Traits::kOwnValue ? 2 : 1;  // of a block and head
  const unsigned index = blockIdx.x / kCtas;
  const int64_t slot = index / p.cache.num_kv_heads;
  const int head = index % p.cache.num_kv_heads;
  const AppendTile tile = BeginAppendTile(p, slot);
  if (tile.block < 0) return;
  if constexpr (!Traits::kOwnValue) {
    GatherTile<Traits, true, true>(p, tile, head);
  } else if (blockIdx.x % 2 == 0) {
    if (threadIdx.x < Traits::kThreads) GatherTile<Traits, true, false>(p, tile, head);
  } else {
    static_assert(Traits::kThreads <= Traits::Value::kThreads, "V's CTAs take all threads");
    GatherTile<typename Traits::Value, false, true>(p, tile, head);
  }
}

template <DType kCode, DType kValueCode, Scales kScales, CacheLayout kLayout>
cudaError_t LaunchAppendCacheVariant(const AppendCacheParams& p, cudaStream_t stream) {
  const int64_t ctas = NumTileSlots(p.num_out_tokens, p.batch) * p.cache.num_kv_heads;
  if (p.num_out_tokens == 0 || p.batch == 0 || p.max_blocks == 0 || p.cache.num_blocks == 0) {
    return cudaSuccess;
  }
  cudaError_t status = cudaSuccess;
  dispatch<DType::kBFloat16, DType::kFloat16>(p.dtype, "key dtype", [&](auto out) {
    AttentionHeadDims::Dispatch(p.cache.head_dim, [&](auto head_dim) {
      using Traits = AppendTraits<decltype(out)::value, kCode, kScales, kLayout,
                                  decltype(head_dim)::value, kValueCode>;
      constexpr int kThreads = std::max(Traits::kThreads, Traits::Value::kThreads);
      status =
          LaunchPdl(AppendCacheKernel<Traits>, dim3(GridSize(Traits::kOwnValue ? 2 * ctas : ctas)),
                    dim3(kThreads), stream, p);
    });
  });
  return status;
}

}  // namespace fastattn::cuda
