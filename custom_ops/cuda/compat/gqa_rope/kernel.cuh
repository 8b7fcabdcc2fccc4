// New tokens of gqa_rope_write_cache, in the lanes of rope_write_cache_kv: a warp of a streaming
// CTA takes a token and walks over its heads, and V of a prefill sequence's tile is written by a
// CTA that transposes it into its cache block. Everything is stored twice or thrice: in qkv_out, in
// q, key or value, and in the cache.
#pragma once

#include <algorithm>

#include "common/ceil_div.h"
#include "common/dispatch.h"
#include "common/head_dims.h"
#include "cuda/cache/shared/head_transform.cuh"
#include "cuda/cache/shared/quantize_lane.cuh"
#include "cuda/cache/shared/step_ring.cuh"
#include "cuda/cache/shared/store_token.cuh"
#include "cuda/cache/shared/stream_grid.cuh"
#include "cuda/cache/shared/value_tile.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/compat/gqa_rope/launch.h"

namespace fastattn::cuda {

inline constexpr int kGqaCtasWanted = 512;

// int8 codes of FastDeploy's layout have 128 added.
template <typename Traits>
inline constexpr uint32_t kCodeFlip = Traits::kCode == DType::kInt8 ? 0x80808080u : 0u;

// K's codes of one token and head into FastDeploy's layout. Two lanes that share two groups of 16
// channels, half of each, trade halves: the even one stores the lower group. All lanes of the warp
// take part.
template <typename Traits, typename Lane>
__device__ __forceinline__ void StoreKeyPiece(const uint32_t (&codes)[Lane::kCodeWords],
                                              uint8_t* plane, int slot, int lane, bool store) {
  static_assert(Lane::kHalf == 8);
  const bool odd = lane % 2 != 0;
  uint32_t low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? codes[i] : codes[2 + i], 1);
    low[i] = odd ? other : codes[i];
    high[i] = odd ? codes[2 + i] : other;
  }
  if (!store || !Lane::IsActive(lane)) return;
  const int group = lane / 2 + (odd ? Lane::kHeadDim / 32 : 0);
  constexpr uint32_t kFlip = kCodeFlip<Traits>;
  *reinterpret_cast<uint4*>(plane +
                            KeyPiece<CacheLayout::kFastDeploy, Lane::kHeadDim>(slot, group)) =
      make_uint4(__byte_perm(low[0], high[0], 0x5410) ^ kFlip,
                 __byte_perm(low[0], high[0], 0x7632) ^ kFlip,
                 __byte_perm(low[1], high[1], 0x5410) ^ kFlip,
                 __byte_perm(low[1], high[1], 0x7632) ^ kFlip);
}

// Token of key and value that a sequence's i-th new token takes, -1 for none.
__device__ __forceinline__ int RaggedToken(const GqaRopeWriteCacheParams& p, int batch_idx, int i) {
  const int first = p.cu_seqlens_k[batch_idx];
  const int prefix =
      PrefixLength(p.seq_lens_encoder[batch_idx], p.rope.seqs.seq_lens_decoder[batch_idx]);
  const int64_t token = static_cast<int64_t>(first) + prefix + i;
  return first >= 0 && token < p.num_kv_tokens && token <= INT32_MAX ? static_cast<int>(token) : -1;
}

// A head's values into row `row` of a tensor [.., heads, D].
template <typename Lane>
__device__ __forceinline__ void StoreHead(void* tensor, int64_t row, int heads, int head, int lane,
                                          const uint32_t (&words)[Lane::kWords]) {
  if (!Lane::IsActive(lane)) return;
  const int64_t element = (row * heads + head) * Lane::kHeadDim + lane * Lane::kHalf;
  StoreHalves<Lane::kWords, Lane::kDistance>(static_cast<uint16_t*>(tensor) + element, words);
}

// K of one token and head into its cache block. All lanes of the warp take part.
template <typename Traits, typename Lane>
__device__ __forceinline__ void StoreGqaKey(const uint32_t (&words)[Lane::kWords],
                                            const PagedCache& cache, int block, int head, int slot,
                                            int lane, bool store) {
  const float scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head);
  const int64_t scale_index = cache.k_scale_strides.Plane(block, head) + slot;
  if constexpr (Traits::kQuantized) {
    uint32_t codes[Lane::kCodeWords];
    QuantizeLane<Traits, Lane>(words, cache, cache.k_scales, cache.k_granularity, scale, head, lane,
                               scale_index, store, codes);
    uint8_t* plane = static_cast<uint8_t*>(cache.key) + cache.key_strides.Plane(block, head);
    StoreKeyPiece<Traits, Lane>(codes, plane, slot, lane, store);
  } else {
    StoreTokenMajor<Traits, Lane>(words, cache, cache.key, nullptr, cache.k_granularity, scale,
                                  head, lane, cache.key_strides.Row(block, head, slot), scale_index,
                                  store);
  }
}

template <typename Traits>
using GqaRing = StepRing<StreamLane<Traits>, 1>;

// Shared memory of a streaming or a V CTA.
template <typename Traits>
inline constexpr int kGqaBytes =
    std::max<int>(sizeof(ValueTile<Traits::kHeadDim>), GqaRing<Traits>::kBytes);

// CTAs an SM: 64 registers a thread. A norm would spill; rotations of any table and size take more.
template <typename Traits>
inline constexpr int kGqaCtas = Traits::kHeadDim > 128   ? 2
                                : Traits::Options::kNorm ? 3
                                                         : 4;

// One token's heads, or a share of them; V of a prefill sequence is the tiles' work.
template <typename Traits>
__device__ __forceinline__ void GqaStreamToken(const GqaRopeWriteCacheParams& p,
                                               const StreamGrid& grid, unsigned cta) {
  using Lane = StreamLane<Traits>;
  constexpr int kHeads = Lane::kHeads;
  const RopeWriteCacheParams& rope = p.rope;
  const PagedCache& cache = rope.cache;
  const int share = cta % grid.shares;
  const int token = cta / grid.shares * (kStreamThreads / 32) + threadIdx.x / 32;
  if (token >= rope.seqs.num_tokens) return;
  const int group = threadIdx.x % 32 / Lane::kLanes;
  const int lane = threadIdx.x % Lane::kLanes;
  const int q_heads = rope.num_heads;
  const int kv_heads = cache.num_kv_heads;
  const int q_steps = (q_heads + kHeads - 1) / kHeads;
  const int kv_steps = (kv_heads + kHeads - 1) / kHeads;
  const int first_step = share * grid.steps_per_share;
  int end_step = min(first_step + grid.steps_per_share, q_steps + 2 * kv_steps);

  // A step's kind, its head of this lane, and how many heads there are before those of the kind.
  struct Heads {
    bool is_q, is_k;
    int head, before;
  };
  const auto heads_of = [&](int step) {
    const bool is_q = step < q_steps;
    const bool is_k = !is_q && step < q_steps + kv_steps;
    const int first = is_q ? step : step - q_steps - (is_k ? 0 : kv_steps);
    return Heads{is_q, is_k, first * kHeads + group, is_q ? 0 : q_heads + (is_k ? 0 : kv_heads)};
  };
  const char* source = static_cast<const char*>(rope.qkv) +
                       (token * rope.qkv_stride + group * Lane::kHeadDim + lane * Lane::kHalf) * 2;
  GqaRing<Traits> ring(SharedBytes<kGqaBytes<Traits>>());
  const auto load = [&](int step) {
    const Heads at = heads_of(step);
    if (step < end_step && at.head < (at.is_q ? q_heads : kv_heads)) {
      ring.template Copy<false>(0, source + (at.before + at.head - group) * (Lane::kHeadDim * 2));
    }
    ring.Commit();
  };
#pragma unroll
  for (int i = 0; i < kStepsAhead; ++i) load(first_step + i);

  const SeqWindow window = LoadWindow(rope.seqs, static_cast<int>(token * grid.seqs_per_token));
  const WarpPlace place = FindPlace(rope.seqs, window, GivenSeq(rope.seqs, token), token);
  const bool owned = place.batch_idx >= 0;
  LaneRotation<Traits, Lane, kStreamThreads / 32> rotation;
  int own_block = -1;
  int out = -1;
  if (owned) {
    rotation.Load(rope, place, lane);
    const uint32_t start = max(rope.seqs.seq_lens_decoder[place.batch_idx], 0);
    out = RaggedToken(p, place.batch_idx, static_cast<int>(place.position - start));
    if (p.seq_lens_encoder[place.batch_idx] > 0) {
      end_step = min(end_step, q_steps + kv_steps);
      own_block =
          BlockOf(rope.seqs, cache.num_blocks, place.batch_idx, place.position / kBlockSize);
    }
  }
  const int own_slot = place.position % kBlockSize;
  for (int step = first_step; step < end_step; ++step) {
    const Heads at = heads_of(step);
    const int lane = KeepInLoop(threadIdx.x) % Lane::kLanes;
    const bool active = at.head < (at.is_q ? q_heads : kv_heads);
    uint32_t rounded[Lane::kWords];
    float x[Lane::kValues];
    uint32_t words[Lane::kWords];
    ring.Wait();
    ring.Read(0, words);
    UnpackWords<Lane>(words, x);
    // Read before the next copy writes there.
#pragma unroll
    for (int i = 0; i < Lane::kValues; ++i) asm volatile("" : "+f"(x[i]));
    load(step + kStepsAhead);
    if (at.is_q || at.is_k) {
      TransformLane<Traits, Lane, true>(rope, rotation, lane,
                                        HeadNorm<Traits, Lane>(rope, at.is_q, lane), x);
    }
    PackWords<Traits::kIn>(x, rounded);
    if (!owned) {
#pragma unroll
      for (int i = 0; i < Lane::kWords; ++i) rounded[i] = 0;
    }
    if (active) {
      const int64_t row = KeepInLoop(token);
      StoreHead<Lane>(p.qkv_out, row, q_heads + 2 * kv_heads, at.before + at.head, lane, rounded);
      if (at.is_q) {
        StoreHead<Lane>(rope.q, row, q_heads, at.head, lane, rounded);
      } else if (out >= 0) {
        StoreHead<Lane>(at.is_k ? p.key : p.value, KeepInLoop(out), kv_heads, at.head, lane,
                        rounded);
      }
    }
    const int block = KeepInLoop(own_block);
    if (at.is_k && block >= 0) {
      StoreGqaKey<Traits, Lane>(rounded, cache, block, active ? at.head : 0, KeepInLoop(own_slot),
                                lane, active);
    }
  }
  ring.Drain();  // what was asked for before end_step came down
}

// V of one KV head of a prefill sequence's tile: into qkv_out, value and the cache.
template <typename Traits>
__device__ __forceinline__ void GqaValueTile(const GqaRopeWriteCacheParams& p, int head,
                                             const TileWork& work,
                                             ValueTile<Traits::kHeadDim>& tile) {
  using Lane = StreamLane<Traits>;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kTokens = kStreamThreads / Lane::kLanes;
  constexpr int kPasses = kBlockSize / kTokens;

  const SeqMeta& seqs = p.rope.seqs;
  const PagedCache& cache = p.rope.cache;
  const int kv_heads = cache.num_kv_heads;
  const int fused_heads = p.rope.num_heads + 2 * kv_heads;
  const int fused_head = fused_heads - kv_heads + head;
  const int lane = threadIdx.x % Lane::kLanes;
  const int first_slot = threadIdx.x / Lane::kLanes;
  const uint16_t* values =
      static_cast<const uint16_t*>(p.rope.qkv) + fused_head * kHeadDim + lane * Lane::kHalf;
  uint32_t words[kPasses][Lane::kWords] = {};
  bool owned[kPasses];
  const auto row = [&](int token) { return values + token * p.rope.qkv_stride; };
  LoadTile<Lane, kTokens>(seqs, work, first_slot, row, words, owned);
  const float scale = HeadScale<Traits>(cache, cache.v_scales, cache.v_granularity, head);
  const int block = BlockOf(seqs, cache.num_blocks, work.batch_idx, work.block_index);
  const int base = work.token - seqs.cu_seqlens_q[work.batch_idx];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int slot = i * kTokens + first_slot;
    if (!owned[i]) continue;
    StoreHead<Lane>(p.qkv_out, work.token + slot, fused_heads, fused_head, lane, words[i]);
    const int out = RaggedToken(p, work.batch_idx, base + slot);
    if (out >= 0) StoreHead<Lane>(p.value, out, kv_heads, head, lane, words[i]);
  }
  if (block < 0) return;
  const int64_t plane = cache.value_strides.Plane(block, head);
  const int64_t scales = cache.v_scale_strides.Plane(block, head);
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int slot = i * kTokens + first_slot;
    if constexpr (Traits::kQuantized) {
      uint32_t codes[Lane::kCodeWords];
      QuantizeLane<Traits, Lane>(words[i], cache, cache.v_scales, cache.v_granularity, scale, head,
                                 lane, scales + slot, owned[i], codes);
#pragma unroll
      for (int w = 0; w < Lane::kCodeWords; ++w) codes[w] ^= kCodeFlip<Traits>;
      if (Lane::IsActive(lane)) {
        StoreHalves<Lane::kCodeWords, kHeadDim / 2>(
            tile.codes + tile.Offset(slot) + lane * Lane::kHalf, codes);
      }
      if (lane == 0) tile.valid[slot] = owned[i];
    } else {
      StoreTokenMajor<Traits, Lane>(words[i], cache, cache.value, nullptr, cache.v_granularity,
                                    scale, head, lane, plane + slot * cache.value_strides.row,
                                    scales + slot, owned[i]);
    }
  }
  if constexpr (Traits::kQuantized) {
    __syncthreads();
    StoreValueTile<CacheLayout::kFastDeploy>(tile, static_cast<uint8_t*>(cache.value) + plane, 0);
  }
}

// How a step is cut, beside StreamGrid: the V CTAs of a head, which share the tile slots.
struct GqaGrid {
  StreamGrid stream;
  int tile_slots;
  int tile_ctas;
};

// Decoding sequences have tile slots, too, and nothing in them: a CTA for each would start and end
// 16 of them for a token. A warp looks at one slot, so a CTA takes 8 at most, and as few as there
// are CTAs for. Its slots lie tile_ctas apart, those of a prompt in CTAs of their own.
inline GqaGrid MakeGqaGrid(const SeqMeta& seqs, int steps, int kv_heads) {
  GqaGrid grid;
  grid.stream = MakeStreamGrid(seqs, steps, kv_heads, kGqaCtasWanted);
  grid.tile_slots = static_cast<int>(NumTileSlots(seqs.num_tokens, seqs.batch, kBlockSize, 2));
  const int tiles = seqs.num_tokens / kBlockSize + 2;  // of one sequence
  const int wanted = std::max(tiles, CeilDiv(kGqaCtasWanted, kv_heads));
  grid.tile_ctas =
      std::max(std::min(wanted, grid.tile_slots), CeilDiv(grid.tile_slots, kStreamThreads / 32));
  grid.stream.ctas = grid.stream.stream_ctas + static_cast<int64_t>(grid.tile_ctas) * kv_heads;
  return grid;
}

// V of one KV head, of the tiles in every tile_ctas-th slot from `cta` on.
template <typename Traits>
__device__ __forceinline__ void GqaValueTiles(const GqaRopeWriteCacheParams& p, const GqaGrid& grid,
                                              int head, int cta) {
  constexpr int kWarps = kStreamThreads / 32;
  __shared__ TileWork works[kWarps];
  auto& tile = *reinterpret_cast<ValueTile<Traits::kHeadDim>*>(SharedBytes<kGqaBytes<Traits>>());
  const int slot = cta + static_cast<int>(threadIdx.x / 32) * grid.tile_ctas;
  TileWork own = {-1, 0, 0, 0, 0};
  if (slot < grid.tile_slots) {
    own = FindTile(p.rope.seqs, slot, grid.stream.seqs_per_tile, p.seq_lens_encoder);
  }
  if (threadIdx.x % 32 == 0) works[threadIdx.x / 32] = own;
  __syncthreads();
  const int count = min(CeilDiv(grid.tile_slots - cta, grid.tile_ctas), kWarps);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const TileWork work = works[i];
    if (work.batch_idx < 0) continue;
    GqaValueTile<Traits>(p, head, work, tile);
    __syncthreads();  // the next one overwrites the tile
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kStreamThreads, kGqaCtas<Traits>)
    GqaStreamKernel(const __grid_constant__ GqaRopeWriteCacheParams p,
                    const __grid_constant__ GqaGrid grid) {
  PdlWait();
  PdlLaunchDependents();
  if (blockIdx.x < grid.stream.stream_ctas) {
    GqaStreamToken<Traits>(p, grid.stream, blockIdx.x);
  } else {
    const unsigned index = blockIdx.x - grid.stream.stream_ctas;
    const int kv_heads = p.rope.cache.num_kv_heads;
    GqaValueTiles<Traits>(p, grid, index % kv_heads, index / kv_heads);
  }
}

template <DType kIn, Scales kScales, DType kCode>
cudaError_t LaunchGqaFormat(const GqaRopeWriteCacheParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  const RopeWriteCacheParams& rope = p.rope;
  const auto launch = [&](auto traits) {
    using Traits = decltype(traits);
    using Lane = StreamLane<Traits>;
    const int kv_heads = rope.cache.num_kv_heads;
    const int steps = CeilDiv(rope.num_heads, Lane::kHeads) + 2 * CeilDiv(kv_heads, Lane::kHeads);
    const GqaGrid grid = MakeGqaGrid(rope.seqs, steps, kv_heads);
    status = LaunchPdl(GqaStreamKernel<Traits>, dim3(GridSize(grid.stream.ctas)),
                       dim3(kStreamThreads), stream, p, grid);
  };
  const bool norm = rope.q_norm_weight != nullptr || rope.k_norm_weight != nullptr;
  HeadDims::Dispatch(rope.cache.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (!IsCommonRope(rope)) {
      launch(StepTraits<kIn, kScales, kCode, kHeadDim, RopeOptions<false, true, true>>{});
    } else if (norm) {
      launch(StepTraits<kIn, kScales, kCode, kHeadDim, RopeOptions<false, true>>{});
    } else {
      launch(StepTraits<kIn, kScales, kCode, kHeadDim, RopeOptions<false, false>>{});
    }
  });
  return status;
}

template <DType kIn>
cudaError_t LaunchGqaTokens(const GqaRopeWriteCacheParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<CacheType::kNone, CacheType::kInt8, CacheType::kFp8, CacheType::kBlockWiseFp8>(
      p.rope.cache.type, "cache_quant_type", [&](auto type) {
        constexpr CacheType kType = decltype(type)::value;
        constexpr DType kCode = IsQuantized(kType) ? CodeOf(kType, false) : kIn;
        status = LaunchGqaFormat<kIn, FormatOf(kType).scales, kCode>(p, stream);
      });
  return status;
}

}  // namespace fastattn::cuda
