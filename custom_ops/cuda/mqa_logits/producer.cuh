// The producer warpgroup: warp 0 finds segments and loads them with TMA, warp 1 (and for MXFP4
// warps 1 to 3) prepares the queries' side, all but warp 0 fill cells that nobody sees.
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/mqa_logits/e2m1_operand.cuh"
#include "cuda/mqa_logits/pipeline.cuh"
#include "cuda/mqa_logits/schedule.cuh"

namespace fastattn::cuda::mqa_logits {

// Warps that prepare the queries' side of a segment.
template <class C>
inline constexpr int kPreparers = C::kFp8 ? 1 : 3;

template <class C>
class Loader {
 public:
  __device__ Loader(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments), p_(arguments.p), shared_(shared), lane_(threadIdx.x % 32) {
    if constexpr (C::kPaged) {
      page_keys_ = static_cast<int>(p_.page_size);
      pieces_ = page_keys_ < kTileKeys ? kTileKeys / page_keys_ : 1;
    }
  }

  __device__ void Run() {
    const int64_t begin = ShareBegin(shared_.total, blockIdx.x);
    int64_t left = ShareBegin(shared_.total, blockIdx.x + 1) - begin;
    int group = shared_.first_group, skip = shared_.first_tile;
    Ring<2> segments;
    while (true) {
      Wait(&shared_.query_empty[segments.index], segments.phase ^ 1);
      if (left <= 0) {
        if (lane_ == 0) shared_.segments[segments.index].tiles = -1;
        ArriveOne(&shared_.segment_found[segments.index]);
        ArriveOne(&shared_.query_full[segments.index]);
        return;
      }
      const TileRange tiles = GroupTilesOfWarp(p_, a_.groups, group, lane_);
      const int count = static_cast<int>(min(int64_t{tiles.end - tiles.begin - skip}, left));
      if (tiles.end > tiles.begin && count > 0) {
        const Segment segment = {a_.groups.FirstRow(p_, group), a_.groups.RowsOf(p_, group),
                                 a_.groups.Sequence(group), tiles.begin + skip, count};
        StartSegment(segment, segments.index);
        LoadTiles(segment);
        left -= count;
        segments.Advance();
      }
      skip = 0;
      ++group;
    }
  }

 private:
  __device__ void ArriveOne(uint64_t* barrier) {
    __syncwarp();
    if (lane_ == 0) Arrive(barrier);
  }

  __device__ void StartSegment(const Segment& segment, int buffer) {
    if (lane_ == 0) {
      shared_.segments[buffer] = segment;
      uint64_t* barrier = &shared_.query_full[buffer];
      if constexpr (C::kFp8) {
        ArriveExpect(barrier, C::kColumns * kDim);
        CopyBox(&a_.query, shared_.query[buffer], barrier, 0, segment.row * C::kHeads, 0);
      } else {
        shared_.wide[buffer] = 0;
        Arrive(barrier);
      }
      Arrive(&shared_.segment_found[buffer]);
    }
    __syncwarp();
  }

  __device__ void LoadTiles(const Segment& segment) {
    const int each = 32 / pieces_;  // tiles whose pages the lanes look up at once
    int ahead = FindPage(segment, 0), page = -1;
#pragma unroll 1
    for (int i = 0; i < segment.tiles; ++i) {
      const int at = i % each;
      if (C::kPaged && at == 0) {
        page = ahead;
        ahead = FindPage(segment, i + each);
      }
      Wait(&shared_.key_empty[stages_.index], stages_.phase ^ 1);
      if constexpr (C::kPaged) {
        LoadPages(segment, i, at, page);
      } else if (lane_ == 0) {
        const int stage = stages_.index, tile = segment.tile + i;
        uint64_t* barrier = &shared_.key_full[stage];
        ArriveExpect(barrier, kTileKeys * (C::kCodeBytes + kLogitsScaleBytes));
        CopyBox(&a_.key, shared_.key[stage], barrier, 0, tile * kTileKeys, 0);
        CopyBox(&a_.key_scales, shared_.scales[stage], barrier,
                tile * kTileKeys * kLogitsScaleBytes, 0, 0);
      }
      __syncwarp();
      stages_.Advance();
    }
  }

  // The page of this lane's piece of a tile: piece lane % pieces_ of tile i + lane / pieces_.
  __device__ int FindPage(const Segment& segment, int i) const {
    if constexpr (!C::kPaged) return -1;
    const int tile = i + lane_ / pieces_;
    if (tile >= segment.tiles) return -1;
    const int key = (segment.tile + tile) * kTileKeys + lane_ % pieces_ * page_keys_;
    return static_cast<int>(p_.PageOf(segment.sequence, key / page_keys_));
  }

  __device__ void LoadPages(const Segment& segment, int i, int at, int page) {
    const int stage = stages_.index, keys = kTileKeys / pieces_;
    uint64_t* barrier = &shared_.key_full[stage];
    const bool mine = lane_ >= at * pieces_ && lane_ < (at + 1) * pieces_;
    const uint32_t assigned =
        __ballot_sync(~0u, mine && page >= 0) >> (at * pieces_);  // a bit a piece
    if (lane_ == 0) {
      const int bits = 8 / pieces_;  // of `unassigned` a piece
      uint32_t unassigned = 0;
      for (int piece = 0; piece < pieces_; ++piece) {
        if (!(assigned >> piece & 1)) unassigned |= ((1u << bits) - 1) << piece * bits;
      }
      shared_.unassigned[stage] = unassigned;
      ArriveExpect(barrier, __popc(assigned) * keys * (C::kCodeBytes + kLogitsScaleBytes));
    }
    __syncwarp();
    if (!mine || page < 0) return;
    const int piece = lane_ % pieces_;
    const int row = pieces_ > 1 ? 0 : (segment.tile + i) * kTileKeys % page_keys_;
    CopyBox(&a_.key, shared_.key[stage] + piece * keys * C::kCodeBytes, barrier, 0, row, page);
    CopyBulk(p_.cache + int64_t{page} * p_.page_stride + page_keys_ * C::kCodeBytes +
                 row * kLogitsScaleBytes,
             shared_.scales[stage] + piece * keys * kLogitsScaleBytes, barrier,
             keys * kLogitsScaleBytes);
  }

  const Arguments& a_;
  const LogitsParams& p_;
  Shared<C>& shared_;
  const int lane_;
  int page_keys_ = kTileKeys, pieces_ = 1;
  Ring<C::kStages> stages_;
};

// Weights and cells of a segment's queries; MXFP4 heads as rows of e4m3.
template <class C>
class Preparer {
 public:
  __device__ Preparer(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p), shared_(shared), thread_(threadIdx.x - 32) {}

  __device__ void Run() {
    Ring<2> segments;
    while (true) {
      const int buffer = segments.index;
      Wait(&shared_.segment_found[buffer], segments.phase);
      const Segment segment = shared_.segments[buffer];
      if (segment.tiles < 0) {
        ArriveWarp(&shared_.query_full[buffer]);
        return;
      }
      Prepare(segment, buffer);
      if constexpr (!C::kFp8) FenceAsyncProxy();
      ArriveWarp(&shared_.query_full[buffer]);
      // The segment's buffer may be written over once these threads have read it.
      ArriveWarp(&shared_.query_empty[buffer]);
      segments.Advance();
    }
  }

 private:
  __device__ void Prepare(const Segment& segment, int buffer) {
    constexpr int kThreads = 32 * kPreparers<C>;
    const int64_t first = int64_t{segment.row} * C::kHeads;
    const int heads = segment.rows * C::kHeads;
    for (int i = thread_; i < C::kColumns; i += kThreads) {
      float weight = i < heads ? p_.weights[first + i] : 0.0f;
      if constexpr (!C::kFp8) {
        if (i < heads) weight *= PrepareHead(first + i, i, buffer);
      }
      shared_.weights[buffer][i] = weight;
    }
    for (int i = thread_; i < C::kQueries; i += kThreads) {
      QueryCells cells = {0, 0, nullptr};
      if (i < segment.rows) {
        const int64_t row = segment.row + i;
        const VisibleKeys keys = VisibleKeysOf(p_, row);
        cells = {keys.begin, keys.end, p_.out + row * p_.row_stride - keys.first};
      }
      shared_.cells[buffer][i] = cells;
    }
  }

  // Writes a head's operand as TMA would with a swizzle of 128 bytes; returns its factor.
  __device__ float PrepareHead(int64_t head, int column, int buffer) {
    const uint32_t exponents =
        *reinterpret_cast<const uint32_t*>(p_.q_scales + head * kLogitsScaleBytes);
    const uint32_t largest = LargestByte(exponents);
    const uint4* codes = reinterpret_cast<const uint4*>(p_.q + head * C::kCodeBytes);
    uint8_t* row = shared_.query[buffer] + column * kDim;
    bool wide = false;
#pragma unroll
    for (int block = 0; block < kDim / kMxBlock; ++block) {
      const uint4 words = codes[block];
      const int shift = ShiftOf(exponents >> 8 * block & 0xFF, largest, words, &wide);
      const uint2 magnitudes = reinterpret_cast<const uint2*>(shared_.magnitudes)[shift];
      const uint32_t four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t low, high;
        ToE4M3(four[s], magnitudes, &low, &high);
        const int piece = 2 * s;  // of 16 bytes
        uint32_t* a = reinterpret_cast<uint32_t*>(row + ((piece ^ column % 8) * 16));
        uint32_t* b = reinterpret_cast<uint32_t*>(row + (((piece + 1) ^ column % 8) * 16));
        a[block] = low, b[block] = high;
      }
    }
    if (wide) shared_.wide[buffer] = 1;
    return RowFactor(largest);
  }

  const LogitsParams& p_;
  Shared<C>& shared_;
  const int thread_;
};

template <class C>
__device__ __forceinline__ void RunProducer(const Arguments& arguments, Shared<C>& shared) {
  const int warp = threadIdx.x / 32;
  if (warp == 0) {
    Loader<C>(arguments, shared).Run();
    return;
  }
  if (warp <= kPreparers<C>) Preparer<C>(arguments, shared).Run();
  constexpr int kFillers = C::kFp8 ? 2 : 3;
  const int filler = C::kFp8 ? warp - 2 : warp - 1;
  if (filler >= 0) {
    FillHidden(arguments.p, blockIdx.x * kFillers + filler, gridDim.x * kFillers, threadIdx.x % 32);
  }
}

}  // namespace fastattn::cuda::mqa_logits
