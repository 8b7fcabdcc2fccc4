// mla_gather_cache on a GPU: a warp an output token, which finds the token's sequence itself. Lanes
// store 8 channels, 16 bytes, side by side.
#include "common/block_table.h"
#include "common/dispatch.h"
#include "common/exact.h"
#include "common/fp4.h"
#include "common/numeric.h"
#include "common/seq_lengths.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/lane.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/prefetch.cuh"
#include "cuda/mla/cache/launch.h"
#include "cuda/mla/cache/row.cuh"

namespace fastattn::cuda {

namespace {

constexpr int kChunkChannels = 8;

// A token's sequence and position in it; batch_idx is negative for a token of none.
struct Place {
  int batch_idx = -1;
  uint32_t position = 0;
};

// The last of the entries that are at most `token`, counted from 0, given those of 32 lanes in
// ascending order; -1 if there is none.
__device__ __forceinline__ int LastAtMost(int64_t token, bool there, int entry) {
  return __popc(__ballot_sync(kFullWarp, there && entry <= token)) - 1;
}

// The whole warp looks for one token: 32 sequences at a time, so that up to 32 need one load.
__device__ __forceinline__ Place FindToken(const MlaGatherParams& p, int64_t token) {
  const int lane = threadIdx.x % 32;
  int first = 0, count = p.batch;
  while (count > 32) {
    const int step = (count + 31) / 32, offset = lane * step;
    const bool there = offset < count;
    const int last = LastAtMost(token, there, there ? *(p.cu_seqlens_k + first + offset) : 0);
    if (last < 0) return {};
    first += last * step;
    count = min(step, count - last * step);
  }
  const bool there = lane < count;
  int start = 0, end = 0, length = 0;
  if (there) {
    start = *(p.cu_seqlens_k + first + lane);
    end = *(p.cu_seqlens_k + first + lane + 1);
    length = *(p.seq_lens_decoder + first + lane);
  }
  const int last = LastAtMost(token, there, start);
  if (last < 0) return {};
  start = __shfl_sync(kFullWarp, start, last);
  end = __shfl_sync(kFullWarp, end, last);
  length = __shfl_sync(kFullWarp, length, last);
  const TokenRange<int64_t> range = WrittenTokens<int64_t>(start, end, length, p.num_out_tokens);
  const int64_t position = token - range.begin;
  if (position < 0 || position >= range.count) return {};  // offsets may be out of order
  return {first + last, static_cast<uint32_t>(position)};
}

__device__ __forceinline__ uint4 Decode(uint2 codes, float scale) {
  float low[4], high[4];
  CodesToFloat<DType::kE4M3>(codes.x, low);
  CodesToFloat<DType::kE4M3>(codes.y, high);
  constexpr DType kOut = DType::kBFloat16;
  return make_uint4(PackPair<kOut>(Mul(low[0], scale), Mul(low[1], scale)),
                    PackPair<kOut>(Mul(low[2], scale), Mul(low[3], scale)),
                    PackPair<kOut>(Mul(high[0], scale), Mul(high[1], scale)),
                    PackPair<kOut>(Mul(high[2], scale), Mul(high[3], scale)));
}

template <MlaFormat kFormat>
__device__ __forceinline__ float ScaleOf(const uint8_t* scales, int chunk) {
  const int tile = chunk / (FactsOf(kFormat).tile / kChunkChannels);
  if constexpr (ScalePlaneBytes(kFormat) > 0) return UE8M0ToFloat(*(scales + tile));
  return *(reinterpret_cast<const float*>(scales) + tile);
}

// Asks for lines of the index tensors ahead of PdlWait, each by one warp: a line that every CTA
// asked for would be asked for one CTA after the other.
__device__ __forceinline__ void PrefetchIndices(const MlaGatherParams& p) {
  if (threadIdx.x % 32 != 0) return;
  const int64_t entry = WarpToken() * 32;
  if (entry <= p.batch) PrefetchL2(p.cu_seqlens_k + entry);
  if (entry < p.batch) PrefetchL2(p.seq_lens_decoder + entry);
  if (entry < int64_t{p.batch} * p.max_blocks) PrefetchL2(p.block_tables + entry);
}

template <MlaFormat kFormat>
__global__ void __launch_bounds__(kMlaThreads)
    GatherKernel(const __grid_constant__ MlaGatherParams p, Divisor page_size) {
  constexpr MlaFormatFacts kFacts = FactsOf(kFormat);
  constexpr int kCodedChunks =  // with a scale of their own; those behind are copied
      (kFacts.tiles > 0 ? kFacts.tiles * kFacts.tile : kFacts.latent) / kChunkChannels;
  constexpr int kChunks = (kFacts.latent + kMlaRopeDim) / kChunkChannels;
  constexpr int kRounds = (kChunks + 31) / 32;
  const int64_t token = WarpToken();
  const int lane = threadIdx.x % 32;
  PrefetchIndices(p);
  PdlWait();
  if (token >= p.num_out_tokens) return;
  const Place place = FindToken(p, token);
  if (place.batch_idx < 0) return;
  const uint32_t index = page_size.Quotient(place.position);
  const int page = BlockOf(p.block_tables, p.max_blocks, static_cast<int>(p.cache.num_pages),
                           place.batch_idx, index);
  if (page < 0) return;
  const MlaRow row = MlaRowOf(p.cache, kFormat, static_cast<uint32_t>(page),
                              place.position - index * page_size.divisor);
  // Everything is loaded before anything is converted.
  uint4 bytes[kRounds];
  float scale[kRounds];
  if constexpr (kFormat == MlaFormat::kFp8) scale[0] = *(p.scale);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int chunk = lane + 32 * i;
    const bool rope = chunk >= kCodedChunks;
    if (chunk >= kChunks) continue;
    if constexpr (kFormat == MlaFormat::kBf16) {
      bytes[i] = *(reinterpret_cast<const uint4*>(row.codes) + chunk);
    } else if (kFormat == MlaFormat::kFp8 || !rope) {
      const uint2 codes = *(reinterpret_cast<const uint2*>(row.codes) + chunk);
      bytes[i] = make_uint4(codes.x, codes.y, 0, 0);
      if constexpr (kFacts.tile > 0) scale[i] = ScaleOf<kFormat>(row.scales, chunk);
    } else {
      const uint8_t* copied = row.codes + kFacts.row_bytes - kMlaRopeChunks * 16;
      bytes[i] = *(reinterpret_cast<const uint4*>(copied) + chunk - kCodedChunks);
    }
  }
  PdlLaunchDependents();
  uint4* out = reinterpret_cast<uint4*>(p.out + token * p.out_stride);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int chunk = lane + 32 * i;
    if (chunk >= kChunks) continue;
    if (kFormat == MlaFormat::kFp8 || (kFacts.tile > 0 && chunk < kCodedChunks)) {
      bytes[i] = Decode(make_uint2(bytes[i].x, bytes[i].y), scale[kFacts.tile > 0 ? i : 0]);
    }
    out[chunk] = bytes[i];
  }
}

}  // namespace

cudaError_t LaunchMlaGatherCache(const MlaGatherParams& p, cudaStream_t stream) {
  if (p.num_out_tokens == 0 || p.batch == 0) return cudaSuccess;
  const dim3 ctas(GridSize((p.num_out_tokens + kMlaWarps - 1) / kMlaWarps));
  const Divisor page_size(static_cast<uint32_t>(p.cache.page_size));
  cudaError_t status = cudaSuccess;
  dispatch<MlaFormat::kBf16, MlaFormat::kFp8, MlaFormat::kFp8x656, MlaFormat::kFp8x584,
           MlaFormat::kFp8x528>(p.cache.format, "cache_format", [&](auto format) {
    status = LaunchPdl(GatherKernel<decltype(format)::value>, ctas, dim3(kMlaThreads), stream, p,
                       page_size);
  });
  return status;
}

}  // namespace fastattn::cuda
