// The loading warp of codes: finds tiles, and loads them with the copy engine. The other three
// warps of the producer warpgroup turn codes into operands (converter.cuh).
#pragma once

#include "cuda/attention/wgmma_sm90/common/items.cuh"
#include "cuda/attention/wgmma_sm90/fp16/blocks.cuh"
#include "cuda/attention/wgmma_sm90/fp16/config.h"
#include "cuda/attention/wgmma_sm90/fp16/scales.cuh"
#include "cuda/common/tma.cuh"

namespace fastattn::cuda::wgmma_fp16 {

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
    wgmma_fp8::ItemWalk<C> walk(a_, shared_);
    walk.Start();
    if (lane_ < 2) shared_.empty_phase[lane_] = 1;
    __syncwarp();
    bool found = FindTile(walk, 0, -1);
    for (int buffer = 0;; buffer ^= 1) {
      if (lane_ == 0) Arrive(&shared_.tile_found[buffer]);
      if (!found) return;
      found = LoadTile(walk, buffer);
    }
  }

 private:
  // Behind it, the stages are full.
  static constexpr int kSearchStep = C::kKeyStages;
  static constexpr int kShort = 32;  // steps of a tile

  // Finds a tile and loads its queries, once those of the one before, in buffer `before`, have been
  // read; -1: there is none. Returns false, with a tile that says so, if there are no more.
  __device__ bool FindTile(wgmma_fp8::ItemWalk<C>& walk, int buffer, int before) {
    const int phase = shared_.empty_phase[buffer];
    Wait(&shared_.query_empty[buffer], phase);
    __syncwarp();
    if (lane_ == 0) shared_.empty_phase[buffer] = phase ^ 1;
    Tile* tile = &shared_.tile[buffer];
    const bool found = walk.Next(tile);
    // The phase is the buffer's number: each tile is one.
    if (before >= 0) Wait(&shared_.query_read, before);
    if (lane_ == 0) {
      if (found) {
        LoadQueries(*tile);
      } else {
        tile->steps = -1;
        Arrive(&shared_.query_full[0]);
      }
    }
    __syncwarp();
    if (found) FindWindow(p_, shared_, buffer, 0);
    return found;
  }

  __device__ void LoadQueries(const volatile Tile& tile) {
    ArriveExpect(&shared_.query_full[0], C::kQueries * C::kRowBytes);
    for (int i = 0; i < C::kConsumers; ++i) {
      CopyQueries(a_, shared_, tile, i, &shared_.query_full[0]);
    }
  }

  // The keys of a step are loaded before the values of the step ahead of it: they are free, and
  // needed, earlier. On the way the next tile is found, as a search takes longer than a step. Where
  // tiles are short that comes last: consumers have an output to write. Returns whether there is
  // one.
  __device__ bool LoadTile(wgmma_fp8::ItemWalk<C>& walk, int buffer) {
    const volatile Tile& tile = shared_.tile[buffer];
    bool found = false;
    if constexpr (C::kTokenScales) scales_.StartTile(buffer);
#pragma unroll 1
    for (int step = -1; step < tile.steps; ++step) {
      const bool more = step + 1 < tile.steps;
      if (more) {
        const StepBlocks next = BlocksOf(shared_, buffer, step + 1);
        LoadKeys(buffer, next);
        if constexpr (C::kTokenScales) {
          scales_.Load(next, tile.kv_head, tile.k_len - (tile.last - step - 1) * C::kKeys);
        }
      }
      if (step >= 0) {
        LoadCodes(buffer, &a_.value, a_.value_planes, BlocksOf(shared_, buffer, step));
      }
      if constexpr (C::kTokenScales) {
        if (more) scales_.Store(IsPartial<C>(tile, step + 1), buffer);
      }
      const int window = step + kWindow / 2;
      if (window % kWindow == 0 && window < tile.steps) FindWindow(p_, shared_, buffer, window);
      const bool at_end = walk.ByItems() && tile.steps <= kShort;
      if (step == (at_end ? tile.steps : min(tile.steps, kSearchStep)) - 1) {
        found = FindTile(walk, buffer ^ 1, buffer);
      }
    }
    return found;
  }

  __device__ void LoadKeys(int buffer, const StepBlocks& blocks) {
    if constexpr (C::kKeyCodes) {
      const int at = keys_.Index();
      Wait(&shared_.key_empty[at], keys_.Phase() ^ 1);
      if (lane_ == 0) {
        shared_.flags[at] = blocks.flags;
        CopyCodes(buffer, &a_.key, a_.key_planes, blocks, shared_.key[at], &shared_.key_full[at]);
      }
      __syncwarp();
      keys_.Advance();
    } else {
      LoadCodes(buffer, &a_.key, a_.key_planes, blocks);
    }
  }

  // Codes that are to be converted.
  __device__ void LoadCodes(int buffer, const CUtensorMap* map, const BlockPlanes& planes,
                            const StepBlocks& blocks) {
    const int at = raw_.Index();
    Wait(&shared_.raw_empty[at], raw_.Phase() ^ 1);
    if (lane_ == 0) {
      shared_.raw_flags[at] = blocks.flags;
      CopyCodes(buffer, map, planes, blocks, shared_.raw[at], &shared_.raw_full[at]);
    }
    __syncwarp();
    raw_.Advance();
  }

  __device__ void CopyCodes(int buffer, const CUtensorMap* map, const BlockPlanes& planes,
                            const StepBlocks& blocks, uint8_t* target, uint64_t* barrier) {
    ArriveExpect(barrier, C::kKeys * C::kDim);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int2 place = PlaceOf(p_, planes, shared_.tile[buffer], blocks.id[i]);
      CopyBox(map, target + i * kBlockSize * C::kDim, barrier, 0, place.x, place.y);
    }
  }

  const Arguments& a_;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  RingCount<C::kKeyStages> keys_;
  RingCount<C::kRawSlots> raw_;
  ScaleLoader<C> scales_;
};

}  // namespace fastattn::cuda::wgmma_fp16
