// K and V of up to 64 tokens of a sequence that share a cache block, one KV head: write_cache_kv
// takes both so, rope_write_cache_kv V (in stream_kernel.cuh). The loads of V's tokens are all
// issued before the first value is used.
#pragma once

#include "cuda/cache/rope_write/launch.h"
#include "cuda/cache/shared/head_transform.cuh"
#include "cuda/cache/shared/key_transform.cuh"
#include "cuda/cache/shared/quantize_lane.cuh"
#include "cuda/cache/shared/store_token.cuh"
#include "cuda/cache/shared/stream_grid.cuh"
#include "cuda/cache/shared/value_tile.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

inline constexpr int kTilesAtOnce = 512;  // CTAs that a GPU holds

// Which of K and V a CTA writes.
enum class TileOutput : int { kValues, kKeys, kBoth };

// Adds V's bias to a tile's values and rounds them again.
template <typename Traits, typename Lane, int kPasses>
__device__ __forceinline__ void AddValueBias(const RopeWriteCacheParams& p,
                                             const RawParameters<Traits, Lane>& raw,
                                             uint32_t (&words)[kPasses][Lane::kWords]) {
  if constexpr (Traits::Options::kBias) {
    if (!HasBias<typename Traits::Options>(p)) return;
    float bias[Lane::kValues];
    raw.Unpack(p.bias_dtype, bias);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      float x[Lane::kValues];
      UnpackWords<Lane>(words[i], x);
#pragma unroll
      for (int c = 0; c < Lane::kValues; ++c) x[c] = Add(x[c], bias[c]);
      PackWords<Traits::kIn>(x, words[i]);
    }
  }
}

// K, V or both of one tile and one head. K's loads follow as V's registers come free: with all of
// them in front the kernel was slower.
template <typename Traits, int kBytes = sizeof(ValueTile<Traits::kCodeBytes>)>
__device__ __forceinline__ void WriteTile(const StepParamsOf<Traits>& p, int head, int tile_slot,
                                          float seqs_per_tile, TileOutput output) {
  using Lane = StreamLane<Traits>;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kTokens = kStreamThreads / Lane::kLanes;
  constexpr int kPasses = kBlockSize / kTokens;
  using Element = typename fastattn::Element<Traits::kIn>::Storage;
  using Tile = ValueTile<Traits::kCodeBytes>;
  Tile& tile = *reinterpret_cast<Tile*>(SharedBytes<kBytes>());

  const SeqMeta& seqs = p.rope.seqs;
  const PagedCache& cache = p.rope.cache;
  const TileWork work = FindTile(seqs, tile_slot, seqs_per_tile);
  if (work.batch_idx < 0) return;
  const int lane = threadIdx.x % Lane::kLanes;
  const int first_slot = threadIdx.x / Lane::kLanes;
  const int offset = head * kHeadDim + lane * Lane::kHalf;
  const Element* keys = static_cast<const Element*>(p.k) + offset;
  const Element* values = static_cast<const Element*>(p.v) + offset;

  uint32_t words[kPasses][Lane::kWords] = {};
  bool owned[kPasses];
  const auto row = [&](int token) {
    return output == TileOutput::kKeys ? keys + token * p.k_stride : values + token * p.v_stride;
  };
  LoadTile<Lane, kTokens>(seqs, work, first_slot, row, words, owned);
  RawParameters<Traits, Lane> bias;
  if (HasBias<typename Traits::Options>(p.rope)) {
    const int fused_head = p.rope.num_heads + cache.num_kv_heads + head;
    bias.Load(p.rope.bias, p.rope.bias_dtype, fused_head * Lane::kHeadDim, lane);
  }
  const float v_scale = HeadScale<Traits>(cache, cache.v_scales, cache.v_granularity, head);
  const float k_scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head);
  const int block = BlockOf(seqs, cache.num_blocks, work.batch_idx, work.block_index);
  if (block < 0) return;
  const int64_t v_plane = cache.value_strides.Plane(block, head);
  const int64_t v_scales = cache.v_scale_strides.Plane(block, head);
  if (output != TileOutput::kKeys) {
    AddValueBias<Traits, Lane>(p.rope, bias, words);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int slot = i * kTokens + first_slot;
      if constexpr (Traits::kNibbles) {
        uint32_t nibbles[kNibbleWords<Lane>];
        QuantizeFourBits<Traits, Lane>(words[i], cache, cache.v_scales, lane,
                                       v_scales + slot * Traits::kTokenScales, owned[i], nibbles);
        if (Lane::IsActive(lane)) {
          StoreNibbles<Lane>(nibbles, tile.codes + tile.Offset(slot), lane);
        }
        if (lane == 0) tile.valid[slot] = owned[i];
      } else if constexpr (Traits::kQuantized) {
        uint32_t codes[Lane::kCodeWords];
        QuantizeLane<Traits, Lane>(words[i], cache, cache.v_scales, cache.v_granularity, v_scale,
                                   head, lane, v_scales + slot, owned[i], codes);
        if (Lane::IsActive(lane)) {
          StoreHalves<Lane::kCodeWords, kHeadDim / 2>(
              tile.codes + tile.Offset(slot) + lane * Lane::kHalf, codes);
        }
        if (lane == 0) tile.valid[slot] = owned[i];
      } else {
        StoreTokenMajor<Traits, Lane>(words[i], cache, cache.value, nullptr, cache.v_granularity,
                                      v_scale, head, lane, v_plane + slot * cache.value_strides.row,
                                      v_scales + slot, owned[i]);
      }
      if (owned[i] && output == TileOutput::kBoth && Lane::IsActive(lane)) {
        LoadHalves<Lane::kWords, Lane::kDistance>(keys + (work.token + slot) * p.k_stride,
                                                  words[i]);
      }
    }
    if constexpr (Traits::kQuantized) {
      __syncthreads();
      StoreValueTile<CacheLayout::kFastattn>(tile, static_cast<uint8_t*>(cache.value) + v_plane,
                                             cache.value_strides.row);
    }
  }
  // The next kernel may be set up under the end of this one. Where all CTAs are there at once and
  // each still has K to write, its CTAs would gather where this one's finish first.
  if constexpr (!Traits::kRope && Traits::kQuantized) {
    if (output != TileOutput::kBoth || gridDim.x * gridDim.y > kTilesAtOnce) PdlLaunchDependents();
  }
  if (output != TileOutput::kValues) {
    const int64_t k_plane = cache.key_strides.Plane(block, head);
    const int64_t k_scales = cache.k_scale_strides.Plane(block, head);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int slot = i * kTokens + first_slot;
      StoreKey<Traits, Lane, kTakesFeedback<Traits>>(
          words[i], p, cache, k_scale, head, lane, k_plane + slot * cache.key_strides.row,
          k_scales + slot * Traits::kTokenScales, owned[i]);
    }
  }
}

inline constexpr int kTileRun = 32768;  // tiles in the grid's second dimension

// Grid: KV heads, tiles, and runs of tiles; with `split`, K and V alternate in the last.
// CTAs an SM: large heads have twice as many values in a thread.
template <typename Traits>
inline constexpr int kTileCtas = Traits::kHeadDim > 128           ? 2
                                 : Traits::kIn == DType::kFloat32 ? 3
                                                                  : 4;

template <typename Traits>
__global__ void __launch_bounds__(kStreamThreads, kTileCtas<Traits>)
    StepTileKernel(const __grid_constant__ StepParamsOf<Traits> p, float seqs_per_tile,
                   bool split) {
  PdlWait();
  const int run = split ? blockIdx.z / 2 : blockIdx.z;
  const int tile_slot = run * kTileRun + blockIdx.y;
  if constexpr (Traits::kOwnValue) {  // always split
    if (blockIdx.z % 2 == 0) {
      WriteTile<typename Traits::Value>(p, blockIdx.x, tile_slot, seqs_per_tile,
                                        TileOutput::kValues);
    } else {
      WriteTile<Traits>(p, blockIdx.x, tile_slot, seqs_per_tile, TileOutput::kKeys);
    }
  } else {
    const TileOutput output = split ? static_cast<TileOutput>(blockIdx.z % 2) : TileOutput::kBoth;
    WriteTile<Traits>(p, blockIdx.x, tile_slot, seqs_per_tile, output);
  }
}

}  // namespace fastattn::cuda
