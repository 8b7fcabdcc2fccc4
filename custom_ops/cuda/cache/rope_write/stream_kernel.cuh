// Prefill where nothing but a full rotation is asked for.
//
// rope_write_cache_kv, two kinds of CTA in one launch: streaming CTAs give a token to each warp,
// which walks over its Q and K heads, a few at a time (LaneShape), two steps of loads ahead; cos
// and sin are read once. V CTAs take one KV head of a tile, up to 64 tokens of a row that share a
// cache block, as in prefill_kernel.cuh. write_cache_kv: K and V of such a tile by one CTA, whose
// loads are all issued before the first value is used.
#pragma once

#include "cuda/cache/rope_write/lane.cuh"
#include "cuda/cache/rope_write/prefill_kernel.cuh"
#include "cuda/cache/shared/seq_window.cuh"
#include "cuda/common/pdl.cuh"

namespace fastattn::cuda {

inline constexpr int kStreamThreads = 256;

template <typename Traits>
using StreamLane = LaneShape<Traits::kIn, Traits::kHeadDim, 8>;

struct StreamGrid {
  int stream_ctas;
  int shares;           // CTAs that share the heads of the same tokens
  int steps_per_share;  // groups of heads that one of them takes
  float rows_per_token;
  float rows_per_tile;
};

// One token's Q and K heads, or a share of them. K follows Q in memory.
template <typename Traits>
__device__ __forceinline__ void StreamToken(const StepParams& p, const StreamGrid& grid,
                                            unsigned cta) {
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
  const int q_steps = (q_heads + kHeads - 1) / kHeads;
  const int k_steps = (cache.num_kv_heads + kHeads - 1) / kHeads;
  const int first_step = share * grid.steps_per_share;
  const int end_step = min(first_step + grid.steps_per_share, q_steps + k_steps);

  const int lane_offset = group * Lane::kHeadDim + lane * Lane::kHalf;
  const uint16_t* source = static_cast<const uint16_t*>(p.q) + token * p.q_stride + lane_offset;
  const auto load = [&](int step, uint32_t (&words)[Lane::kWords], float& scale) {
    const bool is_q = step < q_steps;
    const int head = (is_q ? step : step - q_steps) * kHeads;
    const int first = is_q ? 0 : q_heads * Lane::kHeadDim;
    if (step < end_step && head + group < (is_q ? q_heads : cache.num_kv_heads)) {
      LoadHalves<Lane::kWords, Lane::kHeadDim>(source + first + head * Lane::kHeadDim, words);
      if (!is_q) {
        scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head + group);
      }
    }
  };
  uint32_t words[2][Lane::kWords] = {};
  float scales[2] = {1.0f, 1.0f};
  load(first_step, words[0], scales[0]);
  load(first_step + 1, words[1], scales[1]);

  const SeqWindow window = LoadWindow(rope.seqs, static_cast<int>(token * grid.rows_per_token));
  const WarpPlace place = FindPlace(rope.seqs, window, GivenSeq(rope.seqs, token), token);
  const bool owned = place.batch_idx >= 0;
  LaneAngles<Lane> angles = {};
  int block = -1;
  if (owned) {
    LoadLaneAngles<Lane>(rope, place.position, lane, angles);
    if (end_step > q_steps) {
      block = BlockOf(rope.seqs, cache.num_blocks, place.batch_idx, place.position / kBlockSize);
    }
  }
  const int slot = place.position % kBlockSize;
  const float q_inverse = rope.q_quant == QQuant::kPerTensor ? Reciprocal(*rope.q_scale) : 0.0f;

  const auto work = [&](int step, uint32_t (&words)[Lane::kWords], float& next_scale) {
    uint32_t rounded[Lane::kWords];
    const float scale = next_scale;
    float x[Lane::kValues];
    UnpackWords<Lane>(words, x);
    load(step + 2, words, next_scale);
    RotateLane<Lane>(rope.style, angles, x);
    PackWords<Lane>(x, rounded);
    if (step < q_steps) {
      const int head = step * kHeads + group;
      if (!owned) {
#pragma unroll
        for (int i = 0; i < Lane::kWords; ++i) rounded[i] = 0;
      }
      StoreQuery<Lane>(rounded, rope, q_inverse, token, head, lane, head < q_heads);
    } else {
      const int head = (step - q_steps) * kHeads + group;
      const bool store = block >= 0 && head < cache.num_kv_heads;
      StoreTokenMajor<Traits, Lane>(rounded, cache, cache.key, cache.k_scales, cache.k_granularity,
                                    scale, store ? head : 0, lane,
                                    cache.key_strides.Row(block, head, slot),
                                    cache.k_scale_strides.Plane(block, head) + slot, store);
    }
  };
  for (int step = first_step; step < end_step; step += 2) {
    work(step, words[0], scales[0]);
    if (step + 1 < end_step) work(step + 1, words[1], scales[1]);
  }
}

// A tile of one row: its block and the tokens [low, high) of that block that are new.
struct TileWork {
  int row;  // -1: nothing to do
  int block_index;
  int token;  // of the block's first slot; may lie before the row's first token
  int low, high;
};

__device__ __forceinline__ TileWork FindTile(const SeqMeta& seqs, int tile_slot,
                                             float rows_per_tile) {
  TileWork work = {-1, 0, 0, 0, 0};
  if (seqs.batch == 0) return work;
  const SeqWindow window = LoadWindow(seqs, static_cast<int>(tile_slot * rows_per_tile));
  const int row = PickSeq(seqs, window, tile_slot, kBlockSize, 2);
  if (row < 0) return work;
  const SeqFacts facts = FactsOf(seqs, window, row);
  if (facts.first < 0) return work;
  const int end = max(min(facts.end, seqs.num_tokens), 0);
  const int count = max(min(facts.count, end - facts.first), 0);
  const int start = max(facts.start, 0);
  const int tile = tile_slot - (facts.first / kBlockSize + 2 * row);
  // The block's first slot, counted from the row's first token.
  const int base = tile * kBlockSize - start % kBlockSize;
  work.low = max(-base, 0);
  work.high = min(count - base, kBlockSize);
  work.block_index = start / kBlockSize + tile;
  work.token = facts.first + base;
  if (work.high > work.low) work.row = row;
  return work;
}

// Which of K and V a CTA writes.
enum class TilePart : int { kValues, kKeys, kBoth };

// K, V or both of one tile and one head. K's loads follow as V's registers come free: with all of
// them in front the kernel was slower.
template <typename Traits>
__device__ __forceinline__ void WriteTile(const StepParams& p, int head, int tile_slot,
                                          float rows_per_tile, TilePart part) {
  using Lane = StreamLane<Traits>;
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kTokens = kStreamThreads / Lane::kLanes;
  constexpr int kPasses = kBlockSize / kTokens;
  __shared__ ValueTile<kHeadDim> tile;

  const SeqMeta& seqs = p.rope.seqs;
  const PagedCache& cache = p.rope.cache;
  const TileWork work = FindTile(seqs, tile_slot, rows_per_tile);
  if (work.row < 0) return;
  const int lane = threadIdx.x % Lane::kLanes;
  const int first_slot = threadIdx.x / Lane::kLanes;
  const int offset = head * kHeadDim + lane * Lane::kHalf;
  const uint16_t* keys = static_cast<const uint16_t*>(p.k) + offset;
  const uint16_t* values = static_cast<const uint16_t*>(p.v) + offset;

  uint32_t words[kPasses][Lane::kWords] = {};
  bool owned[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int slot = i * kTokens + first_slot;
    const int token = work.token + slot;
    owned[i] = slot >= work.low && slot < work.high;
    if (owned[i] && seqs.batch_id_per_token != nullptr) {
      owned[i] = seqs.batch_id_per_token[token] == work.row;
    }
    if (owned[i]) {
      const bool k = part == TilePart::kKeys;
      LoadHalves<Lane::kWords, kHeadDim>(
          k ? keys + token * p.k_stride : values + token * p.v_stride, words[i]);
    }
  }
  const float v_scale = HeadScale<Traits>(cache, cache.v_scales, cache.v_granularity, head);
  const float k_scale = HeadScale<Traits>(cache, cache.k_scales, cache.k_granularity, head);
  const int block = BlockOf(seqs, cache.num_blocks, work.row, work.block_index);
  if (block < 0) return;
  const int64_t v_plane = cache.value_strides.Plane(block, head);
  const int64_t v_scales = cache.v_scale_strides.Plane(block, head);
  if (part != TilePart::kKeys) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int slot = i * kTokens + first_slot;
      if constexpr (Traits::kQuantized) {
        uint32_t codes[Lane::kCodeWords];
        QuantizeLane<Traits, Lane>(words[i], cache, cache.v_scales, cache.v_granularity, v_scale,
                                   head, lane, v_scales + slot, owned[i], codes);
        StoreHalves<Lane::kCodeWords, kHeadDim / 2>(
            tile.codes + tile.Offset(slot) + lane * Lane::kHalf, codes);
        if (lane == 0) tile.valid[slot] = owned[i];
      } else {
        StoreTokenMajor<Traits, Lane>(words[i], cache, cache.value, nullptr, cache.v_granularity,
                                      v_scale, head, lane, v_plane + slot * cache.value_strides.row,
                                      v_scales + slot, owned[i]);
      }
      if (owned[i] && part == TilePart::kBoth) {
        LoadHalves<Lane::kWords, kHeadDim>(keys + (work.token + slot) * p.k_stride, words[i]);
      }
    }
    if constexpr (Traits::kQuantized) {
      __syncthreads();
      StoreValueTile<kHeadDim>(tile, static_cast<uint8_t*>(cache.value) + v_plane,
                               cache.value_strides.row);
    }
  }
  if (part != TilePart::kValues) {
    const int64_t k_plane = cache.key_strides.Plane(block, head);
    const int64_t k_scales = cache.k_scale_strides.Plane(block, head);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int slot = i * kTokens + first_slot;
      StoreTokenMajor<Traits, Lane>(words[i], cache, cache.key, cache.k_scales, cache.k_granularity,
                                    k_scale, head, lane, k_plane + slot * cache.key_strides.row,
                                    k_scales + slot, owned[i]);
    }
  }
}

inline constexpr int kTileRun = 32768;  // tiles in the grid's second dimension

// Grid: KV heads, tiles, and runs of tiles; with `split`, K and V take turns in the last.
template <typename Traits>
__global__ void __launch_bounds__(kStreamThreads, 4)
    StepTileKernel(const __grid_constant__ StepParams p, float rows_per_tile, bool split) {
  PdlWait();
  const int run = split ? blockIdx.z / 2 : blockIdx.z;
  const TilePart part = split ? static_cast<TilePart>(blockIdx.z % 2) : TilePart::kBoth;
  WriteTile<Traits>(p, blockIdx.x, run * kTileRun + blockIdx.y, rows_per_tile, part);
}

template <typename Traits>
__global__ void __launch_bounds__(kStreamThreads, 3)
    StepStreamKernel(const __grid_constant__ StepParams p,
                     const __grid_constant__ StreamGrid grid) {
  PdlWait();
  PdlLaunchDependents();
  if (blockIdx.x < grid.stream_ctas) {
    StreamToken<Traits>(p, grid, blockIdx.x);
  } else {
    const unsigned index = blockIdx.x - grid.stream_ctas;
    const int kv_heads = p.rope.cache.num_kv_heads;
    WriteTile<Traits>(p, index % kv_heads, index / kv_heads, grid.rows_per_tile, TilePart::kValues);
  }
}

}  // namespace fastattn::cuda
