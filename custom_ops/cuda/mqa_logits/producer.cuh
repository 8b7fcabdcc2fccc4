// The producer warpgroup: kLoaders warps load tiles with TMA, the first of which finds segments for
// the others; the next (for MXFP4 all others) prepares the queries' side; all but loaders fill
// cells that nobody sees.
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/mqa_logits/e2m1_operand.cuh"
#include "cuda/mqa_logits/pipeline.cuh"
#include "cuda/mqa_logits/schedule.cuh"

namespace fastattn::cuda::mqa_logits {

// Warps that prepare the queries' side of a segment.
template <class C>
inline constexpr int kPreparers = C::kFp8 ? 1 : 4 - C::kLoaders;

template <class C>
class Loader {
 public:
  __device__ Loader(const Arguments& arguments, Shared<C>& shared)
      : a_(arguments),
        p_(KnownParams<C>(arguments.p)),
        shared_(shared),
        lane_(threadIdx.x % 32),
        number_(C::kLoaders == 1 ? 0 : threadIdx.x / 32) {
    if constexpr (C::kPaged) {
      page_keys_ = static_cast<int>(p_.page_size);
      piece_bits_ = page_keys_ < kTileKeys ? __ffs(kTileKeys / page_keys_) - 1 : 0;
    }
  }

  __device__ void Run() {
    Share share;
    if constexpr (C::kPaged) {
      share = FindShareOfWarp<C>(p_, a_.groups, lane_);
    } else {
      share = shared_.share;
    }
    int64_t left = share.units;
    int group = share.group, skip = share.unit;
    Ring<2> segments;
    while (true) {
      if (number_ == 0) Wait(&shared_.query_empty[segments.index], segments.phase ^ 1);
      if (left <= 0) {
        if (number_ > 0) return;
        if (lane_ == 0) shared_.segments[segments.index].tiles = -1;
        ArriveOne(&shared_.segment_found[segments.index]);
        ArriveOne(&shared_.query_full[segments.index]);
        return;
      }
      const TileRange tiles = GroupTilesOfWarp(p_, a_.groups, group, lane_);
      const int stop = static_cast<int>(min(int64_t{UnitsOf<C>(tiles)}, skip + left));
      const int from = max(skip - C::kGroupUnits, 0), to = max(stop - C::kGroupUnits, 0);
      left -= stop - skip;
      if (to > from) {
        const Segment segment = {a_.groups.FirstRow(p_, group), a_.groups.RowsOf(p_, group),
                                 a_.groups.Sequence(group), tiles.begin + from, to - from};
        if constexpr (C::kPaged) {
          const Piece first = FindPiece(segment, 0);  // on its way while the queries are asked for
          if (number_ == 0) StartSegment(segment, segments.index);
          LoadPages(segment, first);
        } else {
          if (number_ == 0) StartSegment(segment, segments.index);
          LoadTiles(segment);
        }
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

  __device__ __forceinline__ bool Loads(int stage) const {
    return C::kLoaders == 1 || stage % C::kLoaders == number_;
  }

  __device__ void LoadTiles(const Segment& segment) {
#pragma unroll 1
    for (int i = 0; i < segment.tiles; ++i) {
      const int stage = stages_.index;
      if (!Loads(stage)) {
        stages_.Advance();
        continue;
      }
      Wait(&shared_.key_empty[stage], stages_.phase ^ 1);
      if (lane_ == 0) {
        const int key = (segment.tile + i) * kTileKeys;
        uint64_t* barrier = &shared_.key_full[stage];
        ArriveExpect(barrier, kTileKeys * (C::kCodeBytes + kLogitsScaleBytes));
        CopyBox(&a_.key, shared_.key[stage], barrier, 0, key, 0);
        CopyBox(&a_.key_scales, shared_.scales[stage], barrier, key * kLogitsScaleBytes, 0, 0);
      }
      __syncwarp();
      stages_.Advance();
    }
  }

  // A lane's piece of a tile: the keys of a page, or a tile's share of those.
  struct Piece {
    int page;
    int row;              // of its first key in the page
    const void* scales;   // of that key
    uint32_t unassigned;  // of the tile: a bit for every 8 keys
    uint32_t bytes;       // of the tile's pieces that have a page
  };

  // Piece lane % pieces of tile i + lane / pieces. All lanes; what a tile takes is known before its
  // turn, which has to be short.
  __device__ Piece FindPiece(const Segment& segment, int i) const {
    const int pieces = 1 << piece_bits_, keys = kTileKeys >> piece_bits_;
    const int tile = i + (lane_ >> piece_bits_), part = lane_ & (pieces - 1);
    Piece piece = {-1, 0, nullptr, 0, 0};
    if (tile < segment.tiles) {
      const int key = (segment.tile + tile) * kTileKeys + part * keys;
      const int block = key / page_keys_;
      piece.page = static_cast<int>(p_.PageOf(segment.sequence, block));
      piece.row = key - block * page_keys_;
    }
    const int bits = 8 >> piece_bits_;
    if (piece.page < 0) {
      piece.unassigned = ((1u << bits) - 1) << part * bits;
    } else {
      piece.scales = p_.cache + piece.page * p_.page_stride + page_keys_ * C::kCodeBytes +
                     piece.row * kLogitsScaleBytes;
      piece.bytes = keys * (C::kCodeBytes + kLogitsScaleBytes);
    }
    for (int step = 1; step < pieces; step *= 2) {
      piece.unassigned |= __shfl_xor_sync(~0u, piece.unassigned, step);
      piece.bytes += __shfl_xor_sync(~0u, piece.bytes, step);
    }
    return piece;
  }

  // `piece` is that of tile 0.
  __device__ void LoadPages(const Segment& segment, Piece piece) {
    const int each = 32 >> piece_bits_;  // tiles whose pages the lanes look up at once
    const int keys = kTileKeys >> piece_bits_, part = lane_ & ((1 << piece_bits_) - 1);
#pragma unroll 1
    for (int i = 0; i < segment.tiles; i += each) {
      if (i > 0) piece = FindPiece(segment, i);  // the stages hide the time that it takes
      const int tiles = min(each, segment.tiles - i);
#pragma unroll 1
      for (int at = 0; at < tiles; ++at) {
        const int stage = stages_.index;
        if (!Loads(stage)) {
          stages_.Advance();
          continue;
        }
        uint64_t* barrier = &shared_.key_full[stage];
        Wait(&shared_.key_empty[stage], stages_.phase ^ 1);
        if (lane_ == at << piece_bits_) {
          shared_.unassigned[stage] = piece.unassigned;
          ArriveExpect(barrier, piece.bytes);
        }
        __syncwarp();
        if (lane_ >> piece_bits_ == at && piece.page >= 0) {
          CopyBox(&a_.key, shared_.key[stage] + part * keys * C::kCodeBytes, barrier, 0, piece.row,
                  piece.page);
          CopyBulk(piece.scales, shared_.scales[stage] + part * keys * kLogitsScaleBytes, barrier,
                   keys * kLogitsScaleBytes);
        }
        __syncwarp();
        stages_.Advance();
      }
    }
  }

  const Arguments& a_;
  const LogitsParams p_;
  Shared<C>& shared_;
  const int lane_, number_;
  int page_keys_ = kTileKeys, piece_bits_ = 0;
  Ring<C::kStages> stages_;
};

// Weights and cells of a segment's queries; MXFP4 heads as rows of e4m3.
template <class C>
class Preparer {
 public:
  __device__ Preparer(const Arguments& arguments, Shared<C>& shared)
      : p_(KnownParams<C>(arguments.p)), shared_(shared), thread_(threadIdx.x - 32 * C::kLoaders) {}

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
    if constexpr (C::kFp8) {
      float weights[C::kColumns / kThreads];  // on their way together
#pragma unroll
      for (int j = 0; j < C::kColumns / kThreads; ++j) {
        const int i = thread_ + j * kThreads;
        weights[j] = i < heads ? p_.weights[first + i] : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < C::kColumns / kThreads; ++j) {
        shared_.weights[buffer][thread_ + j * kThreads] = weights[j];
      }
    } else {
      for (int i = thread_; i < C::kColumns; i += kThreads) {
        float weight = 0.0f;
        if (i < heads) weight = p_.weights[first + i] * PrepareHead(first + i, i, buffer);
        shared_.weights[buffer][i] = weight;
      }
    }
    for (int i = thread_; i < C::kQueries; i += kThreads) {
      QueryCells cells = {0, 0, nullptr};
      if (i < segment.rows) {
        const int64_t row = segment.row + i;
        const VisibleKeys keys = VisibleKeysOf(p_, segment.sequence, row);
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

  const LogitsParams p_;
  Shared<C>& shared_;
  const int thread_;
};

template <class C>
__device__ __forceinline__ void RunProducer(const Arguments& arguments, Shared<C>& shared) {
  const int warp = threadIdx.x / 32;
  if (warp < C::kLoaders) {
    Loader<C>(arguments, shared).Run();
    return;
  }
  if (warp < C::kLoaders + kPreparers<C>) Preparer<C>(arguments, shared).Run();
  constexpr int kFirst = C::kLoaders + (C::kFp8 ? 1 : 0), kFillers = 4 - kFirst;
  const int filler = warp - kFirst;
  if (filler >= 0) {
    FillHidden(KnownParams<C>(arguments.p), blockIdx.x * kFillers + filler, gridDim.x * kFillers,
               threadIdx.x % 32);
  }
}

}  // namespace fastattn::cuda::mqa_logits
