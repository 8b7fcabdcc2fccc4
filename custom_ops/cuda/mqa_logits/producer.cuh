// The producer warpgroup: the first warp finds segments and loads tiles with TMA; the next (for
// MXFP4 all others) prepares the queries' side; warps with nothing else to do fill cells that
// nobody sees.
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/mqa_logits/e2m1_operand.cuh"
#include "cuda/mqa_logits/pipeline.cuh"
#include "cuda/mqa_logits/schedule.cuh"

namespace fastattn::cuda::mqa_logits {

// Warps that prepare the queries' side of a segment.
template <class C>
inline constexpr int kPreparers = C::kFp8 ? 1 : 3;

// A piece of a tile: the keys of a page, or a tile's share of those.
struct Pages {
  int page;
  int row;  // of its first key in the page
};
struct Piece {
  int page;  // -1: none
  int row;
  uint32_t unassigned;  // of the tile: a bit for every 8 keys
  uint32_t bytes;       // of the tile's pieces that have a page
};

template <class C>
class Loader {
 public:
  // Before the share is known, so that nothing of this waits for it.
  __device__ Loader(const Arguments& arguments, Shared<C>& shared, bool lengths_known)
      : a_(arguments),
        p_(KnownParams<C>(arguments.p)),
        groups_(KnownGroups<C>(arguments.groups)),
        shared_(shared),
        lane_(threadIdx.x % 32),
        lengths_known_(lengths_known),
        known_(C::kPaged) {
    if constexpr (C::kPaged) {
      page_keys_ = static_cast<int>(p_.page_size);
      page_bits_ = Kept(__ffs(page_keys_) - 1);
      piece_bits_ = Kept(page_keys_ < kTileKeys ? 6 - page_bits_ : 0);
      max_blocks_ = Kept(static_cast<int>(min(p_.max_blocks, int64_t{0x7FFFFFFF})));
    }
  }

  // The next segment is asked for while this one's tiles are loaded: its queries, weights and page
  // ids would wait behind all the keys that are on their way.
  __device__ void Run(const Share& share) {
    left_ = share.units, group_ = share.group, skip_ = share.unit, tiles_ = share.tiles;
    Pages pages = {-1, 0};
    // Where the share most likely begins: the page ids are on their way while the rest is found
    // out.
    const int sequence = groups_.Sequence(group_);
    const int tile = tiles_.begin + max(skip_ - C::kGroupUnits, 0);
    if constexpr (C::kPaged) pages = FindPages(sequence, tile, tiles_.end - tile, 0);
    Segment segment = NextSegment();
    if constexpr (C::kPaged) {
      if (segment.tiles > 0 && (segment.sequence != sequence || segment.tile != tile)) {
        pages = FindPages(segment, 0);
      }
    }
    Ask(segment);
    // Tiles of this segment that are loaded before the next one is sought, and before it is asked
    // for. A step's first keys had better not wait for that.
    int seek = C::kPaged ? C::kBatch : 0, ask = seek;
    while (segment.tiles > 0) {
      Segment next = {0, 0, 0, 0, -1};
      Pages next_pages = {-1, 0};
      int i = 0;
      following_ = pages;
#pragma unroll 1
      for (int part = 0; part < 3; ++part) {
        const int stop = part == 0 ? seek : part == 1 ? ask : segment.tiles;
        LoadTiles(segment, &i, min(stop, segment.tiles));
        if (part == 0) {
          next = NextSegment();
          if constexpr (C::kPaged) next_pages = FindPages(next, 0);
        } else if (next.tiles > 0 ? part == 1 : part == 2) {
          Ask(next);
        }
      }
      // From here on both buffers of queries are taken. The first is given back by consumers that
      // have come to this segment.
      seek = 0, ask = C::kStages;
      segment = next, pages = next_pages;
    }
  }

 private:
  // x, computed here and not where it is used first.
  __device__ __forceinline__ static int Kept(int x) {
    asm volatile("" : "+r"(x));
    return x;
  }

  // The share's next group that has tiles; tiles = -1 behind the last.
  __device__ Segment NextSegment() {
    while (left_ > 0) {
      if (!known_) {
        tiles_ = C::kPaged && lengths_known_ ? TileRange{0, shared_.group_tiles[group_]}
                                             : GroupTilesOfWarp(p_, groups_, group_, lane_);
      }
      known_ = false;
      const int stop = min(UnitsOf<C>(tiles_), skip_ + left_);
      const int from = max(skip_ - C::kGroupUnits, 0), to = max(stop - C::kGroupUnits, 0);
      const int group = group_++;
      left_ -= stop - skip_;
      skip_ = 0;
      if (to > from) {
        return {groups_.FirstRow(p_, group), groups_.RowsOf(p_, group), groups_.Sequence(group),
                tiles_.begin + from, to - from};
      }
    }
    return {0, 0, 0, 0, -1};
  }

  __device__ void Ask(const Segment& segment) {
    const int buffer = segments_.index;
    Wait(&shared_.query_empty[buffer], segments_.phase ^ 1);
    if (ElectOne()) {
      shared_.segments[buffer] = segment;
      uint64_t* barrier = &shared_.query_full[buffer];
      if (C::kFp8 && segment.tiles > 0) {
        ArriveExpect(barrier, C::kColumns * kDim);
        CopyBox(&a_.query, shared_.query[buffer], barrier, 0, segment.row * C::kHeads, 0);
      } else {
        if (!C::kFp8) shared_.wide[buffer] = 0;
        Arrive(barrier);
      }
      Arrive(&shared_.segment_found[buffer]);
    }
    __syncwarp();
    segments_.Advance();
  }

  // Tiles *i .. stop - 1 of the segment.
  __device__ void LoadTiles(const Segment& segment, int* i, int stop) {
#pragma unroll 1
    while (*i < stop) {
      if constexpr (!C::kPaged) {
        LoadTile(segment.tile + *i);
        stages_.Advance();
        ++*i;
      } else {
        const int each = 32 >> piece_bits_, at = *i & (each - 1);
        if (at == 0) {
          piece_ = PieceOf(following_);
          if (*i + each < segment.tiles) following_ = FindPages(segment, *i + each);
        }
        // The share's first tile goes alone: others' copies would take time ahead of its scales'.
        const int batch = first_ ? 1 : C::kBatch - stages_.index % C::kBatch;
        const int count = min(min(batch, each - at), stop - *i);
        if (first_ && piece_bits_ == 0) {
          LoadFirst();
        } else {
          LoadPieces(at, count);
        }
        first_ = false;
        stages_.Advance(count);
        *i += count;
      }
    }
  }

  __device__ void LoadTile(int tile) {
    const int stage = stages_.index;
    Wait(&shared_.key_empty[stage], stages_.phase ^ 1);
    if (ElectOne()) {
      const int key = tile * kTileKeys;
      uint64_t* barrier = &shared_.key_full[stage];
      ArriveExpect(barrier, kTileKeys * (C::kCodeBytes + kLogitsScaleBytes));
      CopyBox(&a_.key, shared_.key[stage], barrier, 0, key, 0);
      CopyBox(&a_.key_scales, shared_.Scales(stage), barrier, key * kLogitsScaleBytes, 0, 0);
    }
    __syncwarp();
  }

  // Keys of a step are read once, or by few CTAs: they leave the L2 cache before what else it
  // holds.
  __device__ __forceinline__ void Copy(void* target, uint64_t* barrier, int row, int page) const {
    CopyBoxOnce(&a_.key, target, barrier, 0, row, page);
  }
  __device__ __forceinline__ void Copy(const uint8_t* source, void* target, uint64_t* barrier,
                                       uint32_t bytes) const {
    CopyBulkOnce(source, target, barrier, bytes);
  }

  // Piece lane % pieces of tile i + lane / pieces: the page of its keys, as the table has it, and
  // its first key's row there.
  __device__ Pages FindPages(const Segment& segment, int i) const {
    return FindPages(segment.sequence, segment.tile, segment.tiles, i);
  }
  __device__ __forceinline__ Pages FindPages(int sequence, int first, int tiles, int i) const {
    const int pieces = 1 << piece_bits_, keys = kTileKeys >> piece_bits_;
    const int tile = i + (lane_ >> piece_bits_), part = lane_ & (pieces - 1);
    if (tile >= tiles) return {-1, 0};
    const int key = (first + tile) * kTileKeys + part * keys;
    const int block = page_keys_ <= kTileKeys ? key >> page_bits_ : key / page_keys_;
    if (block >= max_blocks_) return {-1, 0};
    return {p_.block_tables[sequence * p_.table_stride + block], key - block * page_keys_};
  }

  // The share's first tile, of one piece: as LoadPieces would, without lanes of its own.
  __device__ __forceinline__ void LoadFirst() {
    const int page = __shfl_sync(~0u, piece_.page, 0), row = __shfl_sync(~0u, piece_.row, 0);
    if (ElectOne()) {
      uint64_t* barrier = &shared_.key_full[0];
      shared_.unassigned[0] = page < 0 ? 0xFF : 0;
      ArriveExpect(barrier, page < 0 ? 0 : kTileKeys * (C::kCodeBytes + kLogitsScaleBytes));
      if (page >= 0) {
        const uint8_t* codes = p_.cache + page * p_.page_stride;
        if constexpr (C::kFp8) {
          Copy(shared_.key[0], barrier, row, page);
        } else {
          Copy(codes + row * C::kCodeBytes, shared_.key[0], barrier, kTileKeys * C::kCodeBytes);
        }
        Copy(codes + page_keys_ * C::kCodeBytes + row * kLogitsScaleBytes, shared_.Scales(0),
             barrier, C::kScaleBytes);
      }
    }
    __syncwarp();
  }

  // What is loaded for it. All lanes.
  __device__ Piece PieceOf(const Pages& pages) const {
    const int pieces = 1 << piece_bits_, keys = kTileKeys >> piece_bits_;
    const int part = lane_ & (pieces - 1), bits = 8 >> piece_bits_;
    Piece piece = {pages.page, pages.row, 0, 0};
    if (piece.page < 0 || piece.page >= p_.num_pages) {
      piece.page = -1;
      piece.unassigned = ((1u << bits) - 1) << part * bits;
    } else {
      piece.bytes = keys * (C::kCodeBytes + kLogitsScaleBytes);
    }
    for (int step = 1; step < pieces; step *= 2) {
      piece.unassigned |= __shfl_xor_sync(~0u, piece.unassigned, step);
      piece.bytes += __shfl_xor_sync(~0u, piece.bytes, step);
    }
    return piece;
  }

  // Tiles at .. at + count - 1 of those whose pieces the lanes have, to as many stages.
  __device__ void LoadPieces(int at, int count) {
    const int keys = kTileKeys >> piece_bits_, part = lane_ & ((1 << piece_bits_) - 1);
    const int turn = (lane_ >> piece_bits_) - at;
    const bool mine = turn >= 0 && turn < count;
    Ring<C::kStages> stages = stages_;
    if (mine) stages.Advance(turn);
    const int stage = stages.index;
    uint64_t* barrier = &shared_.key_full[stage];
    if (mine) Wait(&shared_.key_empty[stage], stages.phase ^ 1);
    if (mine && part == 0) {
      shared_.unassigned[stage] = piece_.unassigned;
      ArriveExpect(barrier, piece_.bytes);
    }
    __syncwarp();
    if (mine && piece_.page >= 0) {
      const uint8_t* page = p_.cache + piece_.page * p_.page_stride;
      uint8_t* target = shared_.key[stage] + part * keys * C::kCodeBytes;
      if (!C::kFp8 && page_keys_ == kTileKeys) {  // a stage is like a page
        Copy(page, target, barrier, C::kStageBytes);
      } else {
        if constexpr (C::kFp8) {
          Copy(target, barrier, piece_.row, piece_.page);
        } else {
          Copy(page + piece_.row * C::kCodeBytes, target, barrier, keys * C::kCodeBytes);
        }
        Copy(page + page_keys_ * C::kCodeBytes + piece_.row * kLogitsScaleBytes,
             shared_.Scales(stage) + part * keys * kLogitsScaleBytes, barrier,
             keys * kLogitsScaleBytes);
      }
    }
    __syncwarp();
  }

  const Arguments& a_;
  const LogitsParams p_;
  const LogitsGroups groups_;
  Shared<C>& shared_;
  const int lane_;
  int page_keys_ = kTileKeys, page_bits_ = 0, piece_bits_ = 0, max_blocks_ = 0;
  int left_, group_, skip_;   // units of the share behind the segments so far, and where they begin
  TileRange tiles_;           // of group_ if known_
  const bool lengths_known_;  // group_tiles has them
  bool known_;
  Pages following_;    // pages of the next tiles, a piece a lane
  Piece piece_;        // of these tiles
  bool first_ = true;  // no tile is loaded yet
  Ring<2> segments_;
  Ring<C::kStages> stages_;
};

// Weights and cells of a segment's queries; MXFP4 heads as rows of e4m3.
template <class C>
class Preparer {
 public:
  __device__ Preparer(const Arguments& arguments, Shared<C>& shared)
      : p_(KnownParams<C>(arguments.p)), shared_(shared), thread_(threadIdx.x - 32) {}

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
        ToE4M3(four[s], magnitudes, 0x01010101u, &low, &high);
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

// What warps of the producer other than the first do.
template <class C>
__device__ __forceinline__ void RunOthers(const Arguments& arguments, Shared<C>& shared) {
  const int warp = threadIdx.x / 32;
  if (warp <= kPreparers<C>) Preparer<C>(arguments, shared).Run();
  constexpr int kFirst = C::kFp8 ? 2 : 1, kFillers = 4 - kFirst;
  const int filler = warp - kFirst;
  if (filler >= 0) {
    FillHidden(KnownParams<C>(arguments.p), blockIdx.x * kFillers + filler, gridDim.x * kFillers,
               threadIdx.x % 32);
  }
}

}  // namespace fastattn::cuda::mqa_logits
