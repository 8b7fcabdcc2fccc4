// The Hopper kernel's producer: tiles of keys into shared memory.
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/mla/attention/wgmma_shared.cuh"

namespace fastattn::cuda::mla_attention {

// Whether a tile is asked for before its buffer is free, where the products take longer than the
// memory: with two tiles of rows for the same keys, of which each CTA asks for a half.
inline constexpr bool kPrefetchTiles = true;

// Tiles of bf16 by TMA, box_rows keys of a page and 64 channels a box. A box whose page is not
// assigned is filled with zeros. One warp.
template <class C>
class TmaProducer {
 public:
  __device__ __forceinline__ TmaProducer(const Arguments& args, Shared<C>& shared)
      : args_(args), shared_(shared), boxes_(kTileKeys / args.box_rows) {}

  __device__ __forceinline__ void Run(const Segment& segment, const Part& part) {
    const int lane = threadIdx.x % 32;
    // Where a sequence has further items, the cache has their keys already.
    const bool prefetches = kPrefetchTiles && args_.plan.group_ctas > 1 && segment.seq.items == 1;
    Box next = FindBox(segment, part.begin * kTileKeys);
    for (int tile = part.begin; tile < part.end; ++tile, ++at_.count) {
      const Box box = next;
      if (tile + 1 < part.end) next = FindBox(segment, (tile + 1) * kTileKeys);
      const unsigned assigned = __ballot_sync(kFullWarp, lane < boxes_ && box.page >= 0);
      const int stage = at_.stage();
      constexpr int kRest = C::kPieces - kHalfPieces;
      if (prefetches && tile + 1 < part.end) Prefetch(next);
      Wait(&shared_.right_empty[stage], at_.phase() ^ 1);
      if (lane == 0) ArriveExpect(&shared_.right_full[stage], kHalfPieces * kPieceBytes);
      __syncwarp();
      Copy<0, kHalfPieces>(box, stage, &shared_.right_full[stage]);
      Wait(&shared_.left_empty[stage], at_.phase() ^ 1);
      if (lane == 0) {
        shared_.assigned[stage] = KeysOf(assigned);
        ArriveExpect(&shared_.left_full[stage], kRest * kPieceBytes);
      }
      __syncwarp();
      Copy<kHalfPieces, C::kPieces>(box, stage, &shared_.left_full[stage]);
    }
  }

 private:
  struct Box {
    int page = -1;
    int row = 0;
  };

  // Of this lane.
  __device__ __forceinline__ Box FindBox(const Segment& segment, int key0) const {
    Box box;
    const int key = key0 + static_cast<int>(threadIdx.x % 32) * args_.box_rows;
    if (static_cast<int>(threadIdx.x % 32) >= boxes_ || key >= segment.seq.k_limit) return box;
    const uint32_t index = args_.page_size.Quotient(static_cast<uint32_t>(key));
    box.row = key - static_cast<int>(index * args_.page_size.divisor);
    box.page = BlockOf(args_.p.seqs.block_tables, args_.p.seqs.max_blocks,
                       static_cast<int>(args_.p.cache.num_pages), segment.batch_idx, index);
    if (box.page < 0) box.page = -1;
    return box;
  }

  __device__ __forceinline__ uint64_t KeysOf(unsigned boxes) const {
    if (boxes_ == 1) return boxes != 0 ? ~uint64_t{0} : 0;
    const uint64_t keys = (uint64_t{1} << args_.box_rows) - 1;
    uint64_t assigned = 0;
    for (int i = 0; i < boxes_; ++i) {
      if (boxes >> i & 1) assigned |= keys << (i * args_.box_rows);
    }
    return assigned;
  }

  // Into the L2 cache: a tile's buffer is not free yet.
  __device__ __forceinline__ void Prefetch(const Box& box) {
    if (static_cast<int>(threadIdx.x % 32) >= boxes_ || box.page < 0) return;
    for (int piece = blockIdx.x % 2; piece < C::kPieces; piece += 2) {
      PrefetchBox(&args_.keys, piece * 128, box.row, box.page);
    }
  }

  // Pieces in the order in which they are multiplied: 4 to 7, 8, 0 to 3.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void Copy(const Box& box, int stage, uint64_t* barrier) {
    const int lane = threadIdx.x % 32;
    if (lane >= boxes_) return;
    uint8_t* target = shared_.keys[stage] + lane * args_.box_rows * 128;
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) {
      const int piece = (i + kHalfPieces) % C::kPieces;
      CopyBox(&args_.keys, target + piece * kPieceBytes, barrier, piece * 128, box.row, box.page);
    }
  }

  const Arguments& args_;
  Shared<C>& shared_;
  int boxes_;
  TileCount at_;
};

// Tiles of codes: loaded half a tile at a time, dequantised, stored. Eight warps, each eight of a
// tile's keys, eight lanes a key. The next tile is on its way to the L2 cache meanwhile: registers
// for more of it there are none.
template <class C>
class CodeProducer {
 public:
  __device__ __forceinline__ CodeProducer(const Arguments& args, Shared<C>& shared)
      : args_(args), shared_(shared) {
    if constexpr (C::kCache == MlaFormat::kFp8) static_scale_ = __ldg(args.p.scale);
  }

  __device__ __forceinline__ void Run(const Segment& segment, const Part& part) {
    const int limit = segment.seq.k_limit, batch_idx = segment.batch_idx, end = part.end;
    if (part.begin >= end) return;
    Token tokens[kTokens];
    unsigned assigned = Find(batch_idx, part.begin * kTileKeys, limit, tokens);
    for (int tile = part.begin; tile < end; ++tile, ++at_.count) {
      const int stage = at_.stage();
      uint8_t* keys = shared_.keys[stage];
      Half right, left;
      Load<1>(tokens, right);
      Wait(&shared_.right_empty[stage], at_.phase() ^ 1);
      Store<1>(right, keys);
      FenceAsyncProxy();
      ArriveWarp(&shared_.right_full[stage]);
      Load<0>(tokens, left);
      const unsigned now = assigned;
      if (tile + 1 < end) {
        assigned = Find(batch_idx, (tile + 1) * kTileKeys, limit, tokens);
        Prefetch(tokens);
      }
      Wait(&shared_.left_empty[stage], at_.phase() ^ 1);
      if (threadIdx.x % 32 == 0) {
        reinterpret_cast<uint8_t*>(&shared_.assigned[stage])[threadIdx.x / 32] =
            static_cast<uint8_t>(now);
      }
      Store<0>(left, keys);
      FenceAsyncProxy();
      ArriveWarp(&shared_.left_full[stage]);
    }
  }

 private:
  static constexpr int kTokens = 2;  // of a lane
  static constexpr bool kRopeRight = C::kPieces == 2 * kHalfPieces;
  static constexpr MlaFormatFacts kFacts = FactsOf(C::kCache);

  // 256 channels of the lane's keys, 32 of each, and what belongs to them.
  struct Half {
    uint4 latent[kTokens][2];
    uint4 rope[kTokens];
    float2 scales[kTokens];
  };

  __device__ __forceinline__ static int Sub() { return threadIdx.x % 8; }
  // In the tile.
  __device__ __forceinline__ static int KeyOf(int i) {
    return threadIdx.x / 32 * 8 + 4 * i + threadIdx.x % 32 / 8;
  }

  // Where a tile's keys are. Returns a bit for each of the warp's keys.
  __device__ __forceinline__ unsigned Find(int batch_idx, int key0, int limit,
                                           Token (&tokens)[kTokens]) const {
    unsigned assigned = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int key = key0 + KeyOf(i);
      tokens[i] = {nullptr, nullptr};
      if (key < limit) {
        tokens[i] = FindToken<C::kCache>(args_.p, args_.page_size, batch_idx, key);
      }
      const unsigned bits = __ballot_sync(kFullWarp, tokens[i].codes != nullptr);
      assigned |= ((bits & 1) | (bits >> 7 & 2) | (bits >> 14 & 4) | (bits >> 21 & 8)) << 4 * i;
    }
    return assigned;
  }

  __device__ __forceinline__ static void Prefetch(const Token (&tokens)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int line = 128 * Sub();
      if (tokens[i].codes == nullptr || line >= kFacts.row_bytes) continue;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(tokens[i].codes + line));
    }
  }

  template <int kHalf>
  __device__ __forceinline__ static void Load(const Token (&tokens)[kTokens], Half& half) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint8_t* codes = tokens[i].codes;
      const bool there = codes != nullptr;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int k = 2 * kHalf + j;
        half.latent[i][j] = make_uint4(0, 0, 0, 0);
        if (there && (kFacts.latent == 512 || k < 3 || Sub() < 4)) {
          half.latent[i][j] = __ldg(reinterpret_cast<const uint4*>(codes) + 8 * k + Sub());
        }
      }
      half.scales[i] = make_float2(0.0f, 0.0f);
      if constexpr (C::kCache == MlaFormat::kFp8x656) {
        if (there) half.scales[i] = __ldg(reinterpret_cast<const float2*>(codes + 512) + kHalf);
      } else if constexpr (C::kCache == MlaFormat::kFp8x584) {
        // Of the pieces 2 * k for the first four lanes, and those behind for the others.
        if (there) {
          const uint32_t bytes =
              __ldg(reinterpret_cast<const uint32_t*>(tokens[i].scales) + kHalf) >>
              (Sub() < 4 ? 0 : 8);
          half.scales[i] = make_float2(UE8M0ToFloat(static_cast<uint8_t>(bytes)),
                                       UE8M0ToFloat(static_cast<uint8_t>(bytes >> 16)));
        }
      }
      if constexpr (kRopeRight != (kHalf == 1)) continue;
      half.rope[i] = make_uint4(0, 0, 0, 0);
      if (!there) continue;
      if constexpr (C::kCache == MlaFormat::kFp8) {
        const uint2 pair = __ldg(reinterpret_cast<const uint2*>(codes + 512) + Sub());
        half.rope[i].x = pair.x;
        half.rope[i].y = pair.y;
      } else {
        const uint8_t* rope = codes + kFacts.row_bytes - 2 * kMlaRopeDim;
        half.rope[i] = __ldg(reinterpret_cast<const uint4*>(rope) + Sub());
      }
    }
  }

  // Channels 256 * kHalf to 256 * kHalf + 255, and the rotated ones with one of the halves.
  template <int kHalf>
  __device__ __forceinline__ void Store(const Half& half, uint8_t* keys) const {
    if constexpr (kRopeRight == (kHalf == 1)) {
      uint8_t* piece = keys + (C::kPieces - 1) * kPieceBytes;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const uint4 bits = C::kCache == MlaFormat::kFp8
                               ? Dequantise(half.rope[i].x, half.rope[i].y, static_scale_)
                               : half.rope[i];
        *reinterpret_cast<uint4*>(piece + Swizzled(KeyOf(i), Sub())) = bits;
      }
    }
    const int chunk = Sub() % 4 * 2;
    // The lanes of the two pieces store their chunks in turn, or they would share banks.
    const int first = Sub() / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int k = 2 * kHalf + j;
      if (kFacts.latent == 448 && k == 3 && Sub() >= 4) continue;
      uint8_t* piece = keys + (2 * k + first) * kPieceBytes;
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const uint4& codes = half.latent[i][j];
        const float scale = C::kCache == MlaFormat::kFp8 ? static_scale_
                            : j == 0                     ? half.scales[i].x
                                                         : half.scales[i].y;
        const uint4 a = Dequantise(codes.x, codes.y, scale);
        const uint4 b = Dequantise(codes.z, codes.w, scale);
        const int row = KeyOf(i);
        *reinterpret_cast<uint4*>(piece + Swizzled(row, chunk + first)) = first == 0 ? a : b;
        *reinterpret_cast<uint4*>(piece + Swizzled(row, chunk + 1 - first)) = first == 0 ? b : a;
      }
    }
  }

  const Arguments& args_;
  Shared<C>& shared_;
  TileCount at_;
  float static_scale_ = 1.0f;
};

}  // namespace fastattn::cuda::mla_attention
