// The loading warp of 8-bit K and V: finds work tiles, and loads them with TMA. The other three
// warps of the producer warpgroup turn codes into operands (converter.cuh).
#pragma once

#include "cuda/attention/wgmma_sm90/common/paired_tile_scheduler.cuh"
#include "cuda/attention/wgmma_sm90/q16/config.h"
#include "cuda/attention/wgmma_sm90/q16/kv_tile_blocks.cuh"
#include "cuda/attention/wgmma_sm90/q16/per_token_scales.cuh"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_q16 {

template <class C>
class CodeLoader {
 public:
  __device__ CodeLoader(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments),
        p_(arguments.p),
        shared_(shared),
        lane_(threadIdx.x % 32),
        scales_(arguments.p, shared) {}

  __device__ void Run() {
    PairedTileScheduler<C> scheduler(a_, shared_);
    scheduler.Start();
    if (lane_ < 2) shared_.empty_phase[lane_] = 1;
    __syncwarp();
    bool found = FindTile(scheduler, 0, -1);
    for (int buffer = 0;; buffer ^= 1) {
      if (lane_ == 0) Arrive(&shared_.tile_found[buffer]);
      if (!found) return;
      found = LoadTile(scheduler, buffer);
    }
  }

 private:
  // After this iteration the stages are full.
  static constexpr int kSearchIteration = C::kKeyStages;
  static constexpr int kShort = 32;  // KV tiles of a work tile

  // Finds a work tile and loads its queries, once those of the one before, in buffer `before` (-1:
  // there is none), have been read. Returns false, with a tile that says so, if there are no more.
  __device__ bool FindTile(PairedTileScheduler<C>& scheduler, int buffer, int before) {
    const int phase = shared_.empty_phase[buffer];
    Wait(&shared_.query_empty[buffer], phase);
    __syncwarp();
    if (lane_ == 0) shared_.empty_phase[buffer] = phase ^ 1;
    WorkTile* tile = &shared_.tile[buffer];
    const bool found = scheduler.Next(tile);
    // The phase is the buffer's number: each work tile is one phase.
    if (before >= 0) Wait(&shared_.query_read, before);
    if (lane_ == 0) {
      if (found) {
        LoadQueries(*tile);
      } else {
        tile->kv_tiles = -1;
        Arrive(&shared_.query_full[0]);
      }
    }
    __syncwarp();
    if (found) LookUpBlocks(p_, shared_, buffer, 0);
    return found;
  }

  __device__ void LoadQueries(const volatile WorkTile& tile) {
    ArriveExpect(&shared_.query_full[0], C::kQueries * C::kRowBytes);
    for (int i = 0; i < C::kConsumers; ++i) {
      CopyQueries(a_, shared_, tile, i, &shared_.query_full[0]);
    }
  }

  // Loads the keys of an iteration before the values of the one ahead of it: their stages are free,
  // and needed, earlier. On the way it finds the next work tile, as a search takes longer than an
  // iteration; where work tiles are short that comes last, since consumers have an output to write.
  // Returns whether there is a next one.
  __device__ bool LoadTile(PairedTileScheduler<C>& scheduler, int buffer) {
    const volatile WorkTile& tile = shared_.tile[buffer];
    bool found = false;
    if constexpr (C::kPerTokenScales) scales_.StartTile(buffer);
#pragma unroll 1
    for (int iteration = -1; iteration < tile.kv_tiles; ++iteration) {
      const bool more = iteration + 1 < tile.kv_tiles;
      if (more) {
        const KvTileBlocks next = BlocksOf(shared_, buffer, iteration + 1);
        LoadKeys(buffer, next);
        if constexpr (C::kPerTokenScales) {
          scales_.Load(next, tile.kv_head,
                       tile.k_len - (tile.last_kv_tile - iteration - 1) * C::kKeys);
        }
      }
      if (iteration >= 0) {
        constexpr int kRows = C::kDim / (C::kNibbles ? 2 : 1);
        LoadCodes<kRows>(buffer, &a_.value, a_.value_planes, BlocksOf(shared_, buffer, iteration));
      }
      if constexpr (C::kPerTokenScales) {
        if (more) scales_.Store(IsPartlyMasked<C>(tile, iteration + 1), buffer);
      }
      const int window = iteration + kBlockLookups / 2;
      if (window % kBlockLookups == 0 && window < tile.kv_tiles)
        LookUpBlocks(p_, shared_, buffer, window);
      // Queries that products read are there until the work tile's last one.
      const bool at_end = !C::kQueryInRegisters || (scheduler.InPairs() && tile.kv_tiles <= kShort);
      if (iteration == (at_end ? tile.kv_tiles : min(tile.kv_tiles, kSearchIteration)) - 1) {
        found = FindTile(scheduler, buffer ^ 1, buffer);
      }
    }
    return found;
  }

  __device__ void LoadKeys(int buffer, const KvTileBlocks& blocks) {
    if constexpr (C::kLoadsKeyOperands) {
      const int at = keys_.Index();
      Wait(&shared_.key_empty[at], keys_.Phase() ^ 1);
      if (lane_ == 0) {
        shared_.flags[at] = blocks.flags;
        CopyCodes(buffer, &a_.key, a_.key_planes, blocks, shared_.key[at], &shared_.key_full[at]);
      }
      __syncwarp();
      keys_.Advance();
    } else {
      LoadCodes<kBlockSize>(buffer, &a_.key, a_.key_planes, blocks);
    }
  }

  // Loads codes that are to be converted; kRows: of a block.
  template <int kRows>
  __device__ void LoadCodes(int buffer, const CUtensorMap* map, const BlockPlanes& planes,
                            const KvTileBlocks& blocks) {
#pragma unroll 1
    for (int part = 0; part < C::kCodeParts; ++part) {
      const int at = code_stages_.Index();
      Wait(&shared_.codes_empty[at], code_stages_.Phase() ^ 1);
      if (lane_ == 0) {
        shared_.code_flags[at] = blocks.flags;
        if constexpr (C::kCodeParts > 1) {
          static_assert(C::kBlocks == 1);
          ArriveExpect(&shared_.codes_full[at], C::kCodeBytes);
          const int2 origin = BlockCoordinates(p_, planes, shared_.tile[buffer], blocks.id[0]);
          CopyBox(map, shared_.codes[at], &shared_.codes_full[at], 0,
                  origin.x + part * (kRows / C::kCodeParts), origin.y);
        } else {
          CopyCodes(buffer, map, planes, blocks, shared_.codes[at], &shared_.codes_full[at]);
        }
      }
      __syncwarp();
      code_stages_.Advance();
    }
  }

  __device__ void CopyCodes(int buffer, const CUtensorMap* map, const BlockPlanes& planes,
                            const KvTileBlocks& blocks, uint8_t* target, uint64_t* barrier) {
    constexpr int kBlockBytes = kBlockSize * C::kDim / (C::kNibbles ? 2 : 1);
    ArriveExpect(barrier, 2 * kBlockBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int2 origin = BlockCoordinates(p_, planes, shared_.tile[buffer], blocks.id[i]);
      CopyBox(map, target + i * kBlockBytes, barrier, 0, origin.x, origin.y);
    }
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  PackedPipelineState<C::kKeyStages> keys_;
  PackedPipelineState<C::kCodeStages> code_stages_;
  PerTokenScaleLoader<C> scales_;
};

}  // namespace fastattn::cuda::wgmma_q16
