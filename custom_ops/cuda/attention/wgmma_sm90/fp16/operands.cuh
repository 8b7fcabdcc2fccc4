// The producer warpgroup of operands: a warp finds tiles, another one loads keys and values with
// the copy engine, and two see to it that no value of a hidden token can reach a result.
#pragma once

#include "cuda/attention/wgmma_sm90/common/items.cuh"
#include "cuda/attention/wgmma_sm90/fp16/blocks.cuh"
#include "cuda/attention/wgmma_sm90/fp16/clean.cuh"
#include "cuda/attention/wgmma_sm90/fp16/config.h"
#include "cuda/attention/wgmma_sm90/fp16/factors.cuh"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_fp16 {

// Finds tiles, a tile ahead of the others: a search takes longer than a step. Loads their queries,
// which have one buffer, as soon as a consumer has read those of the tile before.
template <class C>
class Finder {
 public:
  __device__ Finder(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments), p_(arguments.p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    wgmma_fp8::ItemWalk<C> walk(a_, shared_);
    walk.Start();
    Ring<2> tiles;
    Ring<1> queries;
    bool found = true;
    while (found) {
      const int at = tiles.index;
      Wait(&shared_.query_empty[at], tiles.phase ^ 1);
      Tile* tile = &shared_.tile[at];
      found = walk.Next(tile);
      if (found) {
        FindWindow(p_, shared_, at, 0);
#pragma unroll 1
        for (int part = 0; part < C::kSideWarps; ++part) {
          FindFactors<C>(p_, shared_, *tile, at, part);
        }
      } else if (lane_ == 0) {
        tile->steps = -1;
      }
      ArriveWarp(&shared_.tile_found[at]);
      if (found && lane_ == 0) {
        for (int i = 0; i < C::kConsumers; ++i) PrefetchQueries(*tile, i);
      }
      for (int i = 0; i < C::kConsumers; ++i) {
        Wait(&shared_.query_done[i], queries.phase ^ 1);
        if (found && lane_ == 0) {
          LoadQueries(*tile, i);
        } else if (ArrivesForWarp(lane_)) {
          Arrive(&shared_.query_full[i]);
        }
      }
      __syncwarp();
      tiles.Advance();
      queries.Advance();
    }
  }

 private:
  __device__ void PrefetchQueries(const volatile Tile& tile, int consumer) {
    for (int slice = 0; slice < C::kSlices; ++slice) {
      PrefetchBox(&a_.query, slice * C::kSlice, tile.head, tile.token + 64 * consumer);
    }
  }

  __device__ void LoadQueries(const volatile Tile& tile, int consumer) {
    uint64_t* barrier = &shared_.query_full[consumer];
    ArriveExpect(barrier, 64 * C::kRowBytes);
    CopyQueries(a_, shared_, tile, consumer, barrier);
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
};

// Loads keys and values, without a break between tiles: the keys of a step ahead of the values of
// the step before, as they are free, and needed, earlier.
template <class C>
class OperandLoader {
 public:
  __device__ OperandLoader(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments), p_(arguments.p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    Ring<2> tiles;
    Places before;
    bool first = true;
    while (true) {
      Wait(&shared_.tile_found[tiles.index], tiles.phase);
      const volatile Tile& tile = shared_.tile[tiles.index];
      const int steps = tile.steps;
      if (steps < 0) break;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const StepBlocks blocks = BlocksOf(shared_, tiles.index, step);
        LoadKeys(PlacesOf(a_.key_planes, tile, blocks));
        if (!first) LoadValues(before);
        first = false;
        before = PlacesOf(a_.value_planes, tile, blocks);
        const int window = step + kWindow / 2;
        if (window % kWindow == 0 && window < steps) {
          FindWindow(p_, shared_, tiles.index, window);
        }
      }
      ArriveWarp(&shared_.query_empty[tiles.index]);
      tiles.Advance();
    }
    if (!first) LoadValues(before);
  }

 private:
  // Where a step's blocks lie, and its flags.
  struct Places {
    int2 at[2];
    int flags;
  };

  __device__ Places PlacesOf(const BlockPlanes& planes, const volatile Tile& tile,
                             const StepBlocks& blocks) const {
    return {{PlaceOf(p_, planes, tile, blocks.id[0]), PlaceOf(p_, planes, tile, blocks.id[1])},
            blocks.flags};
  }

  __device__ void LoadKeys(const Places& places) {
    const int at = keys_.index;
    Wait(&shared_.key_empty[at], keys_.phase ^ 1);
    if (lane_ == 0) {
      shared_.flags[at] = places.flags;
      LoadStep(&a_.key, places, shared_.key[at], &shared_.key_full[at]);
    }
    __syncwarp();
    keys_.Advance();
  }

  __device__ void LoadValues(const Places& places) {
    const int at = values_.index;
    Wait(&shared_.value_empty[at], values_.phase ^ 1);
    if (lane_ == 0) {
      shared_.value_flags[at] = places.flags;
      LoadStep(&a_.value, places, shared_.value[at], &shared_.value_full[at]);
    }
    __syncwarp();
    values_.Advance();
  }

  __device__ void LoadStep(const CUtensorMap* map, const Places& places, uint8_t* target,
                           uint64_t* barrier) {
    ArriveExpect(barrier, C::kKeys * C::kRowBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int slice = 0; slice < C::kSlices; ++slice) {
        CopyBox(map, target + (slice * C::kKeys + i * kBlockSize) * C::kSlice, barrier,
                slice * C::kSlice, places.at[i].x, places.at[i].y);
      }
    }
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  Ring<C::kKeyStages> keys_;
  Ring<C::kValueStages> values_;
};

// Looks at the values of operands between copy and product.
template <class C>
class Cleaner {
 public:
  __device__ explicit Cleaner(Shared<C>& shared)
      : shared_(shared), warp_(threadIdx.x / 32 - 2), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    ValueCleaner<C> cleaner(shared_);
    Ring<2> tiles;
    Ring<C::kValueStages> stages;
    while (true) {
      Wait(&shared_.tile_found[tiles.index], tiles.phase);
      const Tile& tile = shared_.tile[tiles.index];
      const int steps = tile.steps, last = tile.last, k_len = tile.k_len;
      ArriveWarp(&shared_.query_empty[tiles.index]);
      if (steps < 0) return;
      tiles.Advance();
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const int at = stages.index;
        Wait(&shared_.value_full[at], stages.phase);
        bool found = false;
        if (shared_.value_flags[at] & kClean) {
          const int written = k_len - (last - step) * C::kKeys;
          found = cleaner.Clean(at, written, warp_, C::kKeys / 16, C::kCleaners);
        }
        if (lane_ == 0) shared_.nan_found[at][warp_] = found;
        FenceAsyncProxy();
        ArriveWarp(&shared_.value_ready[at]);
        stages.Advance();
      }
    }
  }

 private:
  Shared<C>& shared_;
  const int warp_;  // 0 .. kCleaners - 1
  const int lane_;
};

}  // namespace fastattn::cuda::wgmma_fp16
