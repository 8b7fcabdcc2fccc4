// The Hopper kernel's producer: tiles of keys into shared memory.
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/mla/dense/wgmma_shared.cuh"

namespace fastattn::cuda::mla_dense {

// Whether a tile is asked for before its buffer is free.
inline constexpr bool kPrefetchTiles = false;

// CopyBox() to the same place in the CTAs of the cluster that `ctas` has a bit for; each one's
// bytes count towards its own barrier.
__device__ __forceinline__ void CopyBoxToCluster(const CUtensorMap* map, void* target,
                                                 uint64_t* barrier, int c0, int c1, int c2,
                                                 uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(SharedAddress(target)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(ctas)
      : "memory");
}

// Tiles of bf16 by TMA, box_rows keys of a page and 64 channels a box. A box whose page is not
// assigned is filled with zeros. One warp.
template <class C>
class TmaProducer {
 public:
  __device__ __forceinline__ TmaProducer(const Arguments& args, Shared<C>& shared)
      : args_(args), shared_(shared), boxes_(kTileKeys / args.box_rows) {}

  __device__ __forceinline__ void Run(const Segment& segment, const Part& part) {
    const int lane = threadIdx.x % 32;
    Box next = FindBox(segment, part.begin * kTileKeys);
    for (int tile = part.begin; tile < part.end; ++tile, ++at_.count) {
      const Box box = next;
      if (tile + 1 < part.end) next = FindBox(segment, (tile + 1) * kTileKeys);
      const unsigned assigned = __ballot_sync(kFullWarp, lane < boxes_ && box.page >= 0);
      const int stage = at_.stage();
      constexpr int kRest = C::kPieces - kHalfPieces;
      if (kPrefetchTiles && tile + 1 < part.end) Prefetch(next);
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
    const int rank = C::kCluster == 1 ? 0 : static_cast<int>(ClusterRank());
#pragma unroll
    for (int piece = 0; piece < C::kPieces; piece += C::kCluster) {
      if (piece + rank >= C::kPieces) break;
      PrefetchBox(&args_.keys, (piece + rank) * 128, box.row, box.page);
    }
  }

  // Pieces in the order in which they are multiplied: 4 to 7, 8, 0 to 3. The CTAs of a cluster take
  // turns.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void Copy(const Box& box, int stage, uint64_t* barrier) {
    const int lane = threadIdx.x % 32;
    if (lane >= boxes_) return;
    uint8_t* target = shared_.keys[stage] + lane * args_.box_rows * 128;
    const int rank = C::kCluster == 1 ? 0 : static_cast<int>(ClusterRank());
#pragma unroll
    for (int i = kBegin; i < kEnd; i += C::kCluster) {
      if (i + rank >= kEnd) break;
      const int piece = (i + rank + kHalfPieces) % C::kPieces;
      uint8_t* there = target + piece * kPieceBytes;
      if constexpr (C::kCluster == 1) {
        CopyBox(&args_.keys, there, barrier, piece * 128, box.row, box.page);
      } else {
        CopyBoxToCluster(&args_.keys, there, barrier, piece * 128, box.row, box.page,
                         (1 << C::kCluster) - 1);
      }
    }
  }

  const Arguments& args_;
  Shared<C>& shared_;
  int boxes_;
  TileCount at_;
};

// Tiles of codes: loaded a tile ahead into registers, dequantised, stored. Four warps, each 16 of a
// tile's keys, eight lanes a key.
template <class C>
class CodeProducer {
 public:
  __device__ __forceinline__ CodeProducer(const Arguments& args, Shared<C>& shared)
      : args_(args), shared_(shared) {
    if constexpr (C::kCache == MlaFormat::kFp8) static_scale_ = __ldg(args.p.scale);
  }

  __device__ __forceinline__ void Run(const Segment& segment, const Part& part) {
    if (part.begin >= part.end) return;
    Load(segment, part.begin * kTileKeys);
    for (int tile = part.begin; tile < part.end; ++tile, ++at_.count) {
      const int stage = at_.stage();
      uint8_t* keys = shared_.keys[stage];
      Wait(&shared_.right_empty[stage], at_.phase() ^ 1);
      StoreLatent(keys, 2);
      StoreLatent(keys, 3);
      if constexpr (C::kCache == MlaFormat::kFp8x584) StoreRope(keys);
      FenceAsyncProxy();
      ArriveWarp(&shared_.right_full[stage]);
      Wait(&shared_.left_empty[stage], at_.phase() ^ 1);
      if (threadIdx.x % 32 == 0) {
        reinterpret_cast<uint16_t*>(&shared_.assigned[stage])[threadIdx.x / 32] = assigned_;
      }
      if constexpr (C::kCache != MlaFormat::kFp8x584) StoreRope(keys);
      StoreLatent(keys, 0);
      StoreLatent(keys, 1);
      FenceAsyncProxy();
      ArriveWarp(&shared_.left_full[stage]);
      if (tile + 1 < part.end) Load(segment, (tile + 1) * kTileKeys);
    }
  }

 private:
  static constexpr int kTokens = 4;  // of a lane
  static constexpr MlaFormatFacts kFacts = FactsOf(C::kCache);

  __device__ __forceinline__ static int Sub() { return threadIdx.x % 8; }
  // In the tile.
  __device__ __forceinline__ static int KeyOf(int i) {
    return threadIdx.x / 32 * 16 + 4 * i + threadIdx.x % 32 / 8;
  }

  __device__ __forceinline__ void Load(const Segment& segment, int key0) {
    unsigned assigned = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int key = key0 + KeyOf(i);
      Token token{nullptr, nullptr};
      if (key < segment.seq.k_limit) {
        token = FindToken<C::kCache>(args_.p, args_.page_size, segment.batch_idx, key);
      }
      const bool there = token.codes != nullptr;
      const unsigned bits = __ballot_sync(kFullWarp, there);
      assigned |= (bits & 1) << 4 * i | (bits >> 8 & 1) << (4 * i + 1) |
                  (bits >> 16 & 1) << (4 * i + 2) | (bits >> 24 & 1) << (4 * i + 3);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        latent_[i][k] = make_uint4(0, 0, 0, 0);
        if (there && (kFacts.latent == 512 || k < 3 || Sub() < 4)) {
          latent_[i][k] = __ldg(reinterpret_cast<const uint4*>(token.codes) + 8 * k + Sub());
        }
      }
      rope_[i] = make_uint4(0, 0, 0, 0);
      scales_[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (!there) continue;
      if constexpr (C::kCache == MlaFormat::kFp8) {
        const uint2 codes = __ldg(reinterpret_cast<const uint2*>(token.codes + 512) + Sub());
        rope_[i].x = codes.x;
        rope_[i].y = codes.y;
      } else {
        const uint8_t* rope = token.codes + kFacts.row_bytes - 2 * kMlaRopeDim;
        rope_[i] = __ldg(reinterpret_cast<const uint4*>(rope) + Sub());
        if constexpr (C::kCache == MlaFormat::kFp8x656) {
          scales_[i] = __ldg(reinterpret_cast<const float4*>(token.scales));
        } else {
          // Bytes 0, 2, 4, 6 for the first four lanes, the others for the last four.
          const uint2 bytes = __ldg(reinterpret_cast<const uint2*>(token.scales));
          const uint32_t low = bytes.x >> (Sub() < 4 ? 0 : 8);
          const uint32_t high = bytes.y >> (Sub() < 4 ? 0 : 8);
          scales_[i] = make_float4(UE8M0ToFloat(static_cast<uint8_t>(low)),
                                   UE8M0ToFloat(static_cast<uint8_t>(low >> 16)),
                                   UE8M0ToFloat(static_cast<uint8_t>(high)),
                                   UE8M0ToFloat(static_cast<uint8_t>(high >> 16)));
        }
      }
    }
    assigned_ = static_cast<uint16_t>(assigned);
  }

  // Channels 128 * k to 128 * k + 127 of the lane's keys, 16 of each.
  __device__ __forceinline__ void StoreLatent(uint8_t* keys, int k) {
    if (kFacts.latent == 448 && k == 3 && Sub() >= 4) return;
    uint8_t* piece = keys + (2 * k + Sub() / 4) * kPieceBytes;
    const int chunk = Sub() % 4 * 2;
    // The lanes of the two pieces store their chunks in turn, or they would share banks.
    const int first = Sub() / 4;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint4& codes = latent_[i][k];
      const float scale = C::kCache == MlaFormat::kFp8 ? static_scale_
                          : k == 0                     ? scales_[i].x
                          : k == 1                     ? scales_[i].y
                          : k == 2                     ? scales_[i].z
                                                       : scales_[i].w;
      const uint4 a = Dequantise(codes.x, codes.y, scale), b = Dequantise(codes.z, codes.w, scale);
      const int row = KeyOf(i);
      *reinterpret_cast<uint4*>(piece + Swizzled(row, chunk + first)) = first == 0 ? a : b;
      *reinterpret_cast<uint4*>(piece + Swizzled(row, chunk + 1 - first)) = first == 0 ? b : a;
    }
  }

  __device__ __forceinline__ void StoreRope(uint8_t* keys) {
    uint8_t* piece = keys + (C::kPieces - 1) * kPieceBytes;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const uint4 bits = C::kCache == MlaFormat::kFp8
                             ? Dequantise(rope_[i].x, rope_[i].y, static_scale_)
                             : rope_[i];
      *reinterpret_cast<uint4*>(piece + Swizzled(KeyOf(i), Sub())) = bits;
    }
  }

  const Arguments& args_;
  Shared<C>& shared_;
  TileCount at_;
  uint4 latent_[kTokens][4];
  uint4 rope_[kTokens];
  float4 scales_[kTokens];
  float static_scale_ = 1.0f;
  uint16_t assigned_ = 0;
};

}  // namespace fastattn::cuda::mla_dense
