// The loading warp of codes: finds tiles, and loads them with the copy engine. The other three
// warps of the producer warpgroup turn codes into operands (converter.cuh).
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/prefill_half_sm90/blocks.cuh"
#include "cuda/prefill_half_sm90/config.h"
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
    Ring<1> queries;
    while (true) {
      Wait(&shared_.query_empty[tiles.index], tiles.phase ^ 1);
      Tile* tile = &shared_.tile[tiles.index];
      const bool found = walk.Next(tile);
      if (found) Wait(&shared_.query_read, queries.phase ^ 1);
      if (lane_ == 0) {
        if (found) {
          LoadQueries(*tile, &shared_.query_full[tiles.index]);
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
  __device__ void LoadQueries(const volatile Tile& tile, uint64_t* barrier) {
    ArriveExpect(barrier, C::kQueries * C::kRowBytes);
    for (int i = 0; i < C::kConsumers; ++i) {
      for (int slice = 0; slice < C::kSlices; ++slice) {
        CopyBox(&a_.query, shared_.query + (i * C::kSlices + slice) * 64 * C::kSlice, barrier,
                slice * C::kSlice, tile.head, tile.token + 64 * i);
      }
    }
  }

  // The keys of a step are loaded before the values of the step ahead of it: they are free, and
  // needed, earlier.
  __device__ void LoadTile(const volatile Tile& tile) {
    int ahead = FindBlock(p_, tile, 0), block = -1;
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
          ahead = FindBlock(p_, tile, step + 17);
        }
        next = BlocksOf<C>(tile, step + 1, block);
        LoadKeys(tile, next);
        if constexpr (C::kTokenScales) {
          scales_.Load(next, kv_head_, tile.k_len - (tile.last - step - 1) * C::kKeys);
        }
      }
      if (step >= 0) LoadCodes(tile, &a_.value, current);
      if constexpr (C::kTokenScales) {
        if (more) scales_.Store();
      }
    }
  }

  __device__ void LoadKeys(const volatile Tile& tile, const StepBlocks& blocks) {
    if constexpr (C::kKeyCodes) {
      const int at = keys_.index;
      Wait(&shared_.key_empty[at], keys_.phase ^ 1);
      if (lane_ == 0) {
        shared_.flags[at] = blocks.flags;
        CopyCodes(tile, &a_.key, blocks, shared_.key[at], &shared_.key_full[at]);
      }
      __syncwarp();
      keys_.Advance();
    } else {
      LoadCodes(tile, &a_.key, blocks);
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

  __device__ void CopyCodes(const volatile Tile& tile, const CUtensorMap* map,
                            const StepBlocks& blocks, uint8_t* target, uint64_t* barrier) {
    ArriveExpect(barrier, C::kKeys * C::kDim);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int2 place = PlaceOf(p_, tile, kv_head_, blocks.id[i]);
      CopyBox(map, target + i * kBlockSize * C::kDim, barrier, 0, place.x, place.y);
    }
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  int kv_head_;
  Ring<C::kKeyStages> keys_;
  Ring<C::kRawSlots> raw_;
  ScaleLoader<C> scales_;
};

}  // namespace fastattn::cuda::prefill_half_sm90
