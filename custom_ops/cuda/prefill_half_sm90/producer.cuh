// The producer warpgroup: one warp finds tiles and loads them with the copy engine. The other three
// see to it that no value of a hidden token can reach a result, or turn codes into operands
// (converter.cuh).
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/prefill_half_sm90/clean.cuh"
#include "cuda/prefill_half_sm90/config.h"
#include "cuda/prefill_half_sm90/factors.cuh"
#include "cuda/prefill_half_sm90/scales.cuh"
#include "cuda/prefill_sm90/schedule.cuh"

namespace fastattn::cuda::prefill_half_sm90 {

template <class C>
class Loader {
 public:
  __device__ Loader(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments),
        p_(arguments.p),
        shared_(shared),
        lane_(threadIdx.x % 32),
        scales_(arguments.p, shared) {}

  __device__ void Run() {
    prefill_sm90::TileWalk<C, C::kKeyBytes> walk(a_, shared_);
    walk.Start();
    Ring<2> tiles;
    Ring<C::kQueryBuffers> queries;
    while (true) {
      Wait(&shared_.query_empty[tiles.index], tiles.phase ^ 1);
      Tile* tile = &shared_.tile[tiles.index];
      const bool found = walk.Next(tile);
      if constexpr (C::kCodes) {
        if (found) Wait(&shared_.query_read, queries.phase ^ 1);
      }
      if (lane_ == 0) {
        if (found) {
          LoadQueries(*tile, queries.index, &shared_.query_full[tiles.index]);
        } else {
          tile->steps = -1;
          Arrive(&shared_.query_full[tiles.index]);
        }
        Arrive(&shared_.tile_found[tiles.index]);
      }
      __syncwarp();
      if (!found) return;
      LoadTile(*tile);
      tiles.Advance();
      queries.Advance();
    }
  }

 private:
  __device__ void LoadQueries(const volatile Tile& tile, int buffer, uint64_t* barrier) {
    ArriveExpect(barrier, C::kQueries * C::kRowBytes);
    for (int i = 0; i < C::kConsumers; ++i) {
      for (int slice = 0; slice < C::kSlices; ++slice) {
        CopyBox(&a_.query, shared_.query[buffer] + (i * C::kSlices + slice) * 64 * C::kSlice,
                barrier, slice * C::kSlice, tile.head, tile.token + 64 * i);
      }
    }
  }

  // The block of each lane: half lane % 2 of step lane / 2. -1: it is not assigned.
  __device__ int FindBlock(const volatile Tile& tile, int step) const {
    const int slot = 2 * (tile.last - step - lane_ / 2) + lane_ % 2;
    if (slot < 0 || slot >= (tile.k_len + kBlockSize - 1) / kBlockSize) return -1;
    if (!p_.paged) return slot;
    const int64_t row = static_cast<int64_t>(tile.row) * p_.rows.max_blocks;
    const int id = p_.rows.block_tables[row + slot];
    return id < 0 || id >= p_.cache.num_blocks ? -1 : id;
  }

  // The keys of a step are loaded before the values of the step ahead of it: they are free, and
  // needed, earlier.
  __device__ void LoadTile(const volatile Tile& tile) {
    int ahead = FindBlock(tile, 0), block = -1;
    kv_head_ = tile.head / (p_.num_heads / p_.num_kv_heads);
    if constexpr (C::kTokenScales) scales_.StartTile();
    StepBlocks current, next;
#pragma unroll 1
    for (int step = -1; step < tile.steps; ++step) {
      current = next;
      const bool more = step + 1 < tile.steps;
      if (more) {
        if ((step + 1) % 16 == 0) {
          block = ahead;
          ahead = FindBlock(tile, step + 17);
        }
        next = BlocksOf(tile, step + 1, block);
        LoadKeys(tile, next);
        if constexpr (C::kTokenScales) {
          scales_.Load(next, kv_head_, tile.k_len - (tile.last - step - 1) * C::kKeys);
        }
      }
      if (step >= 0) LoadValues(tile, current);
      if constexpr (C::kTokenScales) {
        if (more) scales_.Store();
      }
    }
  }

  __device__ StepBlocks BlocksOf(const volatile Tile& tile, int step, int block) const {
    StepBlocks blocks;
    blocks.flags = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      blocks.id[i] = __shfl_sync(~0u, block, 2 * (step % 16) + i);
      if (blocks.id[i] < 0) blocks.flags |= kUnassigned << i;
    }
    const int start = (tile.last - step) * C::kKeys;
    if (start < tile.common_lo || start + C::kKeys > tile.common_hi) blocks.flags |= kClean;
    return blocks;
  }

  __device__ void LoadKeys(const volatile Tile& tile, const StepBlocks& blocks) {
    if constexpr (C::kCodes && !C::kKeyCodes) {
      LoadCodes(tile, &a_.key, blocks);
    } else {
      const int at = keys_.index;
      Wait(&shared_.key_empty[at], keys_.phase ^ 1);
      if (lane_ == 0) {
        shared_.flags[at] = blocks.flags;
        if constexpr (C::kKeyCodes) {
          CopyCodes(tile, &a_.key, blocks, shared_.key[at], &shared_.key_full[at]);
        } else {
          LoadOperands(tile, &a_.key, blocks, shared_.key[at], &shared_.key_full[at]);
        }
      }
      __syncwarp();
      keys_.Advance();
    }
  }

  __device__ void LoadValues(const volatile Tile& tile, const StepBlocks& blocks) {
    if constexpr (C::kCodes) {
      LoadCodes(tile, &a_.value, blocks);
    } else {
      const int at = values_.index;
      Wait(&shared_.value_empty[at], values_.phase ^ 1);
      if (lane_ == 0) {
        shared_.value_flags[at] = blocks.flags;
        LoadOperands(tile, &a_.value, blocks, shared_.value[at], &shared_.value_full[at]);
      }
      __syncwarp();
      values_.Advance();
    }
  }

  // Coordinates of a block in the tensors of keys and values. One that is not assigned lies outside
  // of them: it arrives as zeros.
  __device__ int2 PlaceOf(const volatile Tile& tile, int block) const {
    if (p_.paged) {
      return make_int2(0, (block < 0 ? p_.cache.num_blocks : block) * p_.num_kv_heads + kv_head_);
    }
    const int end = static_cast<int>(p_.packed.num_tokens);
    return make_int2(block < 0 ? end : tile.key_token + block * kBlockSize, kv_head_);
  }

  __device__ void LoadOperands(const volatile Tile& tile, const CUtensorMap* map,
                               const StepBlocks& blocks, uint8_t* target, uint64_t* barrier) {
    ArriveExpect(barrier, C::kKeys * C::kRowBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int2 place = PlaceOf(tile, blocks.id[i]);
#pragma unroll
      for (int slice = 0; slice < C::kSlices; ++slice) {
        CopyBox(map, target + (slice * C::kKeys + i * kBlockSize) * C::kSlice, barrier,
                slice * C::kSlice, place.x, place.y);
      }
    }
  }

  __device__ void CopyCodes(const volatile Tile& tile, const CUtensorMap* map,
                            const StepBlocks& blocks, uint8_t* target, uint64_t* barrier) {
    ArriveExpect(barrier, C::kKeys * C::kDim);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int2 place = PlaceOf(tile, blocks.id[i]);
      CopyBox(map, target + i * kBlockSize * C::kDim, barrier, 0, place.x, place.y);
    }
  }

  // Codes that are to be converted.
  __device__ void LoadCodes(const volatile Tile& tile, const CUtensorMap* map,
                            const StepBlocks& blocks) {
    const int at = raw_.index;
    Wait(&shared_.raw_empty[at], raw_.phase ^ 1);
    if (lane_ == 0) {
      shared_.raw_flags[at] = blocks.flags;
      CopyCodes(tile, map, blocks, shared_.raw[at], &shared_.raw_full[at]);
    }
    __syncwarp();
    raw_.Advance();
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  int kv_head_;
  Ring<C::kKeyStages> keys_;
  Ring<C::kValueStages> values_;
  Ring<C::kRawSlots> raw_;
  ScaleLoader<C> scales_;
};

// Looks at the values of operands between copy and product.
template <class C>
class Cleaner {
 public:
  __device__ Cleaner(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p), shared_(shared), warp_(threadIdx.x / 32 - 1), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    ValueCleaner<C> cleaner(shared_);
    Ring<2> tiles;
    Ring<C::kValueStages> stages;
    while (true) {
      Wait(&shared_.tile_found[tiles.index], tiles.phase);
      const Tile& tile = shared_.tile[tiles.index];
      const int steps = tile.steps, last = tile.last, k_len = tile.k_len;
      if (steps >= 0) FindFactors<C>(p_, shared_, tile, tiles.index, warp_);
      __syncwarp();
      if (lane_ == 0) {
        Arrive(&shared_.query_full[tiles.index]);
        Arrive(&shared_.query_empty[tiles.index]);
      }
      if (steps < 0) return;
      tiles.Advance();
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const int at = stages.index;
        Wait(&shared_.value_full[at], stages.phase);
        bool found = false;
        if (shared_.value_flags[at] & kClean) {
          const int written = k_len - (last - step) * C::kKeys;
          found = cleaner.Clean(at, written, warp_, C::kKeys / 16, C::kSideWarps);
        }
        if (lane_ == 0) shared_.nan_found[at][warp_] = found;
        FenceAsyncProxy();
        __syncwarp();
        if (lane_ == 0) Arrive(&shared_.value_ready[at]);
        stages.Advance();
      }
    }
  }

 private:
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int warp_;  // 0 .. kSideWarps - 1
  const int lane_;
};

}  // namespace fastattn::cuda::prefill_half_sm90
