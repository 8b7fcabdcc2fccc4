// mla_write_cache on a GPU: a warp a token. Latent and slot are loaded at once; nothing goes
// through shared memory.
//
// Where tiles have scales, a lane has 16 neighbouring channels, so that it stores 16 bytes of codes
// and a tile lies in 4 or 8 neighbouring lanes.
#include <type_traits>

#include "common/dispatch.h"
#include "common/exact.h"
#include "common/mla_scale.h"
#include "common/numeric.h"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/prefetch.cuh"
#include "cuda/common/quad.cuh"
#include "cuda/mla/cache/encode.cuh"
#include "cuda/mla/cache/launch.h"
#include "cuda/mla/cache/row.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kLaneChannels = 16;  // of a lane, where tiles have scales

// Up to kFewTokens a CTA has fewer warps, so that more multiprocessors have one.
constexpr int64_t kFewTokens = 512;
constexpr int kFewWarps = 4;

__device__ __forceinline__ uint4 Load16(const uint16_t* from, int chunk) {
  return *(reinterpret_cast<const uint4*>(from) + chunk);
}

__device__ __forceinline__ void Store16(uint8_t* to, int chunk, uint4 bytes) {
  reinterpret_cast<uint4*>(to)[chunk] = bytes;
}

// A token's values in the lanes of a warp.
template <MlaFormat kFormat, MlaScaleRule kRule>
struct Token {
  static constexpr MlaFormatFacts kFacts = FactsOf(kFormat);
  static constexpr int kLanes = kFacts.tile > 0 ? kFacts.latent / kLaneChannels : 32;

  uint4 latent[2], rope;
  float cache_scale;  // kFp8

  __device__ __forceinline__ void Load(const MlaWriteParams& p, int64_t token, int lane) {
    const uint16_t* from = p.latent + token * p.latent_stride;
    latent[0] = latent[1] = rope = make_uint4(0, 0, 0, 0);
    if (lane < kLanes) {
      // 16 channels in a row, or chunks that neighbouring lanes load side by side.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        latent[i] = Load16(from, kFacts.tile > 0 ? 2 * lane + i : lane + 32 * i);
      }
    }
    if (lane < kMlaRopeChunks) rope = Load16(p.rope + token * p.rope_stride, lane);
    if constexpr (kFormat == MlaFormat::kFp8) cache_scale = *(p.scale);
  }

  __device__ __forceinline__ float TileScale() const {
    constexpr int kTileLanes = kFacts.tile / kLaneChannels;
    const uint32_t pair = LanesMax2<kTileLanes>(__vmaxu2(AmaxPair(latent[0]), AmaxPair(latent[1])));
    const uint32_t amax = max(pair << 16, pair & 0xFFFF0000u);
    return kRule == MlaScaleRule::kPow2 ? PowerOfTwoFp8Scale(amax) : AmaxFp8Scale(amax);
  }

  __device__ __forceinline__ void StoreTiles(MlaRow row, int lane) const {
    constexpr int kTileLanes = kFacts.tile / kLaneChannels;
    const float scale = TileScale();
    using Division = std::conditional_t<kRule == MlaScaleRule::kPow2, PowerOfTwoQuotient, Quotient>;
    const Division division(scale);
    const uint2 low = Encode(latent[0], division), high = Encode(latent[1], division);
    if (lane < kLanes) Store16(row.codes, lane, make_uint4(low.x, low.y, high.x, high.y));
    uint4 last = rope;
    if constexpr (kFormat == MlaFormat::kFp8x656) {
      uint32_t scales[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scales[i] = __shfl_sync(kFullWarp, FloatBits(scale), i * kTileLanes);
      }
      // The scales lie ahead of the rotated channels: lane 0 stores them, 8 others those.
      const uint4 moved =
          make_uint4(__shfl_up_sync(kFullWarp, rope.x, 1), __shfl_up_sync(kFullWarp, rope.y, 1),
                     __shfl_up_sync(kFullWarp, rope.z, 1), __shfl_up_sync(kFullWarp, rope.w, 1));
      last = lane == 0 ? make_uint4(scales[0], scales[1], scales[2], scales[3]) : moved;
      if (lane <= kMlaRopeChunks) Store16(row.codes, kLanes + lane, last);
    } else {
      if (lane < kMlaRopeChunks) Store16(row.codes, kLanes + lane, last);
      if (lane % kTileLanes == 0) {
        row.scales[lane / kTileLanes] = lane < kLanes ? PowerOfTwoToUe8m0(scale) : 0;
      }
    }
  }

  __device__ __forceinline__ void Store(MlaRow row, int lane) const {
    if constexpr (kFormat == MlaFormat::kBf16) {
      Store16(row.codes, lane, latent[0]);
      Store16(row.codes, lane + 32, latent[1]);
      if (lane < kMlaRopeChunks) Store16(row.codes, lane + 64, rope);
    } else if constexpr (kFormat == MlaFormat::kFp8) {
      const Quotient division(cache_scale);
      uint2* codes = reinterpret_cast<uint2*>(row.codes);
      codes[lane] = Encode(latent[0], division);
      codes[lane + 32] = Encode(latent[1], division);
      if (lane < kMlaRopeChunks) codes[lane + 64] = Encode(rope, division);
    } else {
      StoreTiles(row, lane);
    }
  }
};

// Asks for a token's values and slot ahead of PdlWait.
template <MlaFormat kFormat>
__device__ __forceinline__ void PrefetchToken(const MlaWriteParams& p, int64_t token, int lane) {
  constexpr int kLines = FactsOf(kFormat).latent * 2 / 128;
  if (token >= p.num_slots) return;
  if (lane < kLines) PrefetchL2(p.latent + token * p.latent_stride + lane * 64);
  if (lane == kLines) PrefetchL2(p.rope + token * p.rope_stride);
  if (lane == kLines + 1) PrefetchIndex(p.slots, token);
  // Once: all warps load it, and requests for a line that is on its way go one after the other.
  if constexpr (kFormat == MlaFormat::kFp8) {
    if (lane == kLines + 2 && token == 0) PrefetchL2(p.scale);
  }
}

template <MlaFormat kFormat, MlaScaleRule kRule>
__global__ void __launch_bounds__(kMlaThreads)
    WriteKernel(const __grid_constant__ MlaWriteParams p, uint32_t slots, Divisor page_size) {
  const int64_t token = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  PrefetchToken<kFormat>(p, token, lane);
  PdlWait();
  if (token >= p.num_slots) return;
  const int64_t slot = p.slots.At(token);
  Token<kFormat, kRule> values;
  values.Load(p, token, lane);
  PdlLaunchDependents();
  if (slot < 0 || slot >= slots) return;
  const uint32_t page = page_size.Quotient(static_cast<uint32_t>(slot));
  const uint32_t row = static_cast<uint32_t>(slot) - page * page_size.divisor;
  values.Store(MlaRowOf(p.cache, kFormat, page, row), lane);
}

}  // namespace

cudaError_t LaunchMlaWriteCache(const MlaWriteParams& p, cudaStream_t stream) {
  const auto slots = static_cast<uint32_t>(p.cache.num_pages * p.cache.page_size);
  const Divisor page_size(static_cast<uint32_t>(p.cache.page_size));
  if (p.num_slots == 0 || slots == 0) return cudaSuccess;
  const int warps = p.num_slots <= kFewTokens ? kFewWarps : kMlaWarps;
  const dim3 ctas(GridSize((p.num_slots + warps - 1) / warps));
  cudaError_t status = cudaSuccess;
  const auto launch = [&](auto kernel) {
    status = LaunchPdl(kernel, ctas, dim3(32 * warps), stream, p, slots, page_size);
  };
  dispatch<MlaFormat::kBf16, MlaFormat::kFp8, MlaFormat::kFp8x656, MlaFormat::kFp8x584>(
      p.cache.format, "cache_format", [&](auto format) {
        constexpr MlaFormat kFormat = decltype(format)::value;
        if constexpr (kFormat == MlaFormat::kFp8x656) {
          if (p.scale_rule == MlaScaleRule::kAmax) {
            launch(WriteKernel<kFormat, MlaScaleRule::kAmax>);
            return;
          }
        }
        launch(WriteKernel<kFormat, MlaScaleRule::kPow2>);
      });
  return status;
}

}  // namespace fastattn::cuda
