// The producer warpgroup of 16-bit K and V: a warp finds work tiles, another one loads keys and
// values with TMA, and two scrub NaNs out of V, so that no value of a masked key can reach a
// result.
#pragma once

#include "cuda/attention/wgmma_sm90/common/paired_tile_scheduler.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/kv_tile_blocks.cuh"
#include "cuda/attention/wgmma_sm90/q16/nan_scrub.cuh"
#include "cuda/attention/wgmma_sm90/q16/tile_factors.cuh"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_q16 {

// Finds work tiles, one ahead of the others: a search takes longer than an iteration. Loads their
// queries, which have one buffer, as soon as a consumer has read those of the work tile before.
template <class C>
class TileFinder {
 public:
  __device__ TileFinder(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments), p_(arguments.p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    PairedTileScheduler<C> scheduler(a_, shared_);
    scheduler.Start();
    PipelineState<2> tiles;
    PipelineState<1> queries;
    bool found = true;
    while (found) {
      const int at = tiles.index;
      Wait(&shared_.query_empty[at], tiles.phase ^ 1);
      WorkTile* tile = &shared_.tile[at];
      found = scheduler.Next(tile);
      if (found) {
        LookUpBlocks(p_, shared_, at, 0);
#pragma unroll 1
        for (int share = 0; share < C::kHelperWarps; ++share) {
          FindFactors<C>(p_, shared_, *tile, at, share);
        }
      } else if (lane_ == 0) {
        tile->kv_tiles = -1;
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
  __device__ void PrefetchQueries(const volatile WorkTile& tile, int consumer) {
    for (int slice = 0; slice < C::kSlices; ++slice) {
      PrefetchBox(&a_.query, slice * C::kSlice, tile.head, tile.token + 64 * consumer);
    }
  }

  __device__ void LoadQueries(const volatile WorkTile& tile, int consumer) {
    uint64_t* barrier = &shared_.query_full[consumer];
    ArriveExpect(barrier, 64 * C::kRowBytes);
    CopyQueries(a_, shared_, tile, consumer, barrier);
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
};

// Loads keys and values, without a break between work tiles: the keys of an iteration ahead of the
// values of the one before, as their stages are free, and needed, earlier.
template <class C>
class KvLoader {
 public:
  __device__ KvLoader(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments), p_(arguments.p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    PipelineState<2> tiles;
    KvTileCoordinates before;
    bool first = true;
    while (true) {
      Wait(&shared_.tile_found[tiles.index], tiles.phase);
      const volatile WorkTile& tile = shared_.tile[tiles.index];
      const int kv_tiles = tile.kv_tiles;
      if (kv_tiles < 0) break;
#pragma unroll 1
      for (int iteration = 0; iteration < kv_tiles; ++iteration) {
        const KvTileBlocks blocks = BlocksOf(shared_, tiles.index, iteration);
        LoadKeys(CoordinatesOf(a_.key_planes, tile, blocks));
        if (!first) LoadValues(before);
        first = false;
        before = CoordinatesOf(a_.value_planes, tile, blocks);
        const int window = iteration + kBlockLookups / 2;
        if (window % kBlockLookups == 0 && window < kv_tiles) {
          LookUpBlocks(p_, shared_, tiles.index, window);
        }
      }
      ArriveWarp(&shared_.query_empty[tiles.index]);
      tiles.Advance();
    }
    if (!first) LoadValues(before);
  }

 private:
  // Where a KV tile's blocks lie, and its flags.
  struct KvTileCoordinates {
    int2 at[2];
    int flags;
  };

  __device__ KvTileCoordinates CoordinatesOf(const BlockPlanes& planes,
                                             const volatile WorkTile& tile,
                                             const KvTileBlocks& blocks) const {
    constexpr int kLast = C::kBlocks - 1;
    return {{BlockCoordinates(p_, planes, tile, blocks.id[0]),
             BlockCoordinates(p_, planes, tile, blocks.id[kLast])},
            blocks.flags};
  }

  __device__ void LoadKeys(const KvTileCoordinates& coordinates) {
    const int at = keys_.index;
    Wait(&shared_.key_empty[at], keys_.phase ^ 1);
    if (lane_ == 0) {
      shared_.flags[at] = coordinates.flags;
      LoadKvTile<C::kSlices>(&a_.key, coordinates, shared_.key[at], &shared_.key_full[at]);
    }
    __syncwarp();
    keys_.Advance();
  }

  __device__ void LoadValues(const KvTileCoordinates& coordinates) {
    const int at = values_.index;
    Wait(&shared_.value_empty[at], values_.phase ^ 1);
    if (lane_ == 0) {
      shared_.value_flags[at] = coordinates.flags;
      LoadKvTile<C::kValueSlices>(&a_.value, coordinates, shared_.value[at],
                                  &shared_.value_full[at]);
    }
    __syncwarp();
    values_.Advance();
  }

  template <int kSlices>
  __device__ void LoadKvTile(const CUtensorMap* map, const KvTileCoordinates& coordinates,
                             uint8_t* target, uint64_t* barrier) {
    ArriveExpect(barrier, C::kKeys * kSlices * C::kSlice);
#pragma unroll
    for (int i = 0; i < C::kBlocks; ++i) {
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        CopyBox(map, target + (slice * C::kKeys + i * kBlockSize) * C::kSlice, barrier,
                slice * C::kSlice, coordinates.at[i].x, coordinates.at[i].y);
      }
    }
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  PipelineState<C::kKeyStages> keys_;
  PipelineState<C::kValueStages> values_;
};

// Scrubs 16-bit values between copy and product.
template <class C>
class ScrubWarp {
 public:
  __device__ explicit ScrubWarp(Shared<C>& shared)
      : shared_(shared), warp_(threadIdx.x / 32 - 2), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    NanScrubber<C> scrubber(shared_);
    PipelineState<2> tiles;
    PipelineState<C::kValueStages> stages;
    while (true) {
      Wait(&shared_.tile_found[tiles.index], tiles.phase);
      const WorkTile& tile = shared_.tile[tiles.index];
      const int kv_tiles = tile.kv_tiles, last = tile.last_kv_tile, k_len = tile.k_len;
      ArriveWarp(&shared_.query_empty[tiles.index]);
      if (kv_tiles < 0) return;
      tiles.Advance();
#pragma unroll 1
      for (int iteration = 0; iteration < kv_tiles; ++iteration) {
        const int at = stages.index;
        Wait(&shared_.value_full[at], stages.phase);
        bool found = false;
        if (shared_.value_flags[at] & kNeedsScrub) {
          const int written = k_len - (last - iteration) * C::kKeys;
          found = scrubber.Scrub(at, written, warp_, C::kKeys / 16, C::kScrubWarps);
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
  const int warp_;  // 0 .. kScrubWarps - 1
  const int lane_;
};

}  // namespace fastattn::cuda::wgmma_q16
