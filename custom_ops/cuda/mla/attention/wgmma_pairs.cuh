// Consumers that take tiles in pairs, for bf16 where products take longer than the memory. The left
// warpgroup scores the first tile of a pair and the right one the second, so that one's softmax
// runs beside the other's products. Each has 256 channels of the output, and gets the weights of
// the other's tile through shared memory: they lie in the tile's rotated channels, which are done
// with by then, so that no tile is loaded before both have released it.
#pragma once

#include "cuda/mla/attention/wgmma_consumer.cuh"

namespace fastattn::cuda::mla_attention {

template <class C, int kSide>
class PairConsumer {
 public:
  __device__ __forceinline__ PairConsumer(const Arguments& args, Shared<C>& shared)
      : args_(args), shared_(shared), scale_(args.p.softmax_scale * kLog2E) {
    positive_ = scale_ > 0.0f;
    query_ = OperandDescriptor<128>(SharedAddress(shared.q));
  }

  __device__ __forceinline__ void Run(const Segment& segment, const Part& part,
                                      const Workspace& workspace) {
    const MlaAttentionParams& p = args_.p;
    LoadQuery<C>(p, segment, part, shared_);
    float out[128], scores[32];
    uint32_t weights[16];
#pragma unroll
    for (float& x : out) x = 0.0f;
#pragma unroll
    for (float& x : scores) x = 0.0f;
    rows_.maximum[0] = rows_.maximum[1] = -INFINITY;
    rows_.sum[0] = rows_.sum[1] = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = part.row0 + OwnRow() + 8 * h;
      rows_.seen[h] = row < part.rows ? VisibleKeys(p, segment.seq, row / p.heads) : 0;
    }
    int tile = part.begin;
    for (; tile + 1 < part.end; tile += 2, at_.count += 2) {
      const TileCount other{at_.count + 1};
      if constexpr (kSide == 0) {
        Score(at_, scores);
        WaitGroups<0>();
        TakeOwn(tile, at_, part.least, scores, weights, out);
        WaitGroups<0>();
        KeepFloats(out);
        KeepRegisters(weights);
        Release(at_);
        TakeOther(other, out);
        WaitGroups<0>();
        KeepFloats(out);
        Release(other);
      } else {
        Score(other, scores);
        TakeOther(at_, out);
        WaitGroups<1>();
        KeepFloats(scores);
        float keep[2];
        WeighOwn(tile + 1, other, part.least, scores, weights, keep);
        WaitGroups<0>();
        KeepFloats(out);
        Release(at_);
        AddOwn(other, keep, weights, out);
        WaitGroups<0>();
        KeepFloats(out);
        KeepRegisters(weights);
        Release(other);
      }
    }
    if (tile < part.end) {
      if constexpr (kSide == 0) {
        Score(at_, scores);
        WaitGroups<0>();
        TakeOwn(tile, at_, part.least, scores, weights, out);
      } else {
        TakeOther(at_, out);
      }
      WaitGroups<0>();
      KeepFloats(out);
      Release(at_);
      ++at_.count;
    }
    Finish(segment, part, workspace);
    float* partial = workspace.partial + Slot(part) * kTileRows * kMlaAttentionChannels;
    StoreOutput<C>(p, segment, part, partial, 256 * kSide, out, shared_);
  }

 private:
  struct Rows {
    float maximum[2];
    float sum[2];  // of this side's tiles
    int seen[2];
  };

  __device__ __forceinline__ uint8_t* Weights(int stage) {
    return shared_.keys[stage] + 2 * kHalfPieces * kPieceBytes;
  }
  __device__ __forceinline__ uint64_t Values(int stage) {
    return TransposedDescriptor<kPieceBytes>(
        SharedAddress(shared_.keys[stage] + kSide * kHalfPieces * kPieceBytes));
  }
  __device__ __forceinline__ void Release(const TileCount& at) {
    ArriveWarp(kSide == 0 ? &shared_.left_empty[at.stage()] : &shared_.right_empty[at.stage()]);
  }

  __device__ __forceinline__ void Score(const TileCount& at, float (&scores)[32]) {
    const int stage = at.stage();
    const uint64_t keys = OperandDescriptor<128>(SharedAddress(shared_.keys[stage]));
    Wait(&shared_.right_full[stage], at.phase());
    FenceProducts();
#pragma unroll
    for (int i = 0; i < 4 * kHalfPieces; ++i) {
      const int offset = (kHalfPieces + i / 4) * (kPieceBytes / 16) + i % 4 * 2;
      MultiplyScores(scores, query_ + offset, keys + offset, i > 0);
    }
    Wait(&shared_.left_full[stage], at.phase());
    FenceProducts();
#pragma unroll
    for (int i = 0; i < 4 * (C::kPieces - kHalfPieces); ++i) {
      const int piece = i / 4 == 0 ? 2 * kHalfPieces : i / 4 - 1;  // the last one first
      const int offset = piece * (kPieceBytes / 16) + i % 4 * 2;
      MultiplyScores(scores, query_ + offset, keys + offset, 1);
    }
    CommitProducts();
  }

  // Own scores are there: weights, for both warpgroups.
  __device__ __forceinline__ void WeighOwn(int tile, const TileCount& at, int least,
                                           float (&scores)[32], uint32_t (&weights)[16],
                                           float (&keep)[2]) {
    const int stage = at.stage(), key0 = tile * kTileKeys, lane = threadIdx.x % 32;
    const uint64_t assigned = shared_.assigned[stage];
    const bool edge = key0 + kTileKeys > least;
    if (edge) ScrubKeys(least - key0, shared_.keys[stage]);
    WeighScores(edge || assigned != ~uint64_t{0}, rows_.seen[0] - key0, rows_.seen[1] - key0,
                assigned, positive_, scale_, scores, rows_.maximum, rows_.sum, keep, weights);
    // No warp of this side multiplies with the rotated channels any more.
    SyncNamed<128>(kLeftBarrier + kSide);
    const int row = threadIdx.x / 32 % 4 * 16 + lane % 16;
    const uint32_t target = SharedAddress(Weights(stage));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      StoreMatrices(target + Swizzled(row, 2 * k + lane / 16), weights + 4 * k);
    }
    if (lane % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        shared_.keep[stage][OwnRow() + 8 * h] = keep[h];
        shared_.maximum[stage][OwnRow() + 8 * h] = rows_.maximum[h];
      }
    }
    FenceAsyncProxy();
    ArriveWarp(&shared_.weights_full[stage]);
  }

  __device__ __forceinline__ void AddOwn(const TileCount& at, const float (&keep)[2],
                                         uint32_t (&weights)[16], float (&out)[128]) {
    Rescale(out, keep[0], keep[1]);
    FenceProducts();
    const uint64_t values = Values(at.stage());
#pragma unroll
    for (int k = 0; k < 4; ++k) MultiplyValues(out, weights + 4 * k, values + k * 2048 / 16);
    CommitProducts();
  }

  __device__ __forceinline__ void TakeOwn(int tile, const TileCount& at, int least,
                                          float (&scores)[32], uint32_t (&weights)[16],
                                          float (&out)[128]) {
    KeepFloats(scores);
    float keep[2];
    WeighOwn(tile, at, least, scores, weights, keep);
    AddOwn(at, keep, weights, out);
  }

  // The other side's tile.
  __device__ __forceinline__ void TakeOther(const TileCount& at, float (&out)[128]) {
    const int stage = at.stage();
    // Both were loaded before the weights were made; a wait makes them visible here.
    Wait(kSide == 0 ? &shared_.left_full[stage] : &shared_.right_full[stage], at.phase());
    Wait(&shared_.weights_full[stage], at.phase());
    float keep[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      keep[h] = shared_.keep[stage][OwnRow() + 8 * h];
      rows_.maximum[h] = shared_.maximum[stage][OwnRow() + 8 * h];
      rows_.sum[h] *= keep[h];
    }
    Rescale(out, keep[0], keep[1]);
    FenceProducts();
    const uint64_t weights = OperandDescriptor<128>(SharedAddress(Weights(stage)));
    const uint64_t values = Values(stage);
#pragma unroll
    for (int k = 0; k < 4; ++k) MultiplyValues(out, weights + 2 * k, values + k * 2048 / 16);
    CommitProducts();
  }

  __device__ __forceinline__ void ScrubKeys(int first, uint8_t* keys) {
    for (int i = max(first, 0) * 64 + static_cast<int>(threadIdx.x % 128); i < kTileKeys * 64;
         i += 128) {
      uint4* chunk =
          reinterpret_cast<uint4*>(keys + i % 64 / 8 * kPieceBytes + i / 64 * 128 + i % 8 * 16);
      *chunk = FiniteChannels(*chunk);
    }
    FenceAsyncProxy();
    SyncNamed<128>(kLeftBarrier + kSide);
  }

  __device__ __forceinline__ static int64_t Slot(const Part& part) {
    return PartialSlot(blockIdx.x, part.continued);
  }

  __device__ __forceinline__ void Finish(const Segment& segment, const Part& part,
                                         const Workspace& workspace) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      rows_.sum[h] += __shfl_xor_sync(kFullWarp, rows_.sum[h], 1);
      rows_.sum[h] += __shfl_xor_sync(kFullWarp, rows_.sum[h], 2);
      if (kSide == 1 && threadIdx.x % 4 == 0) shared_.sum[OwnRow() + 8 * h] = rows_.sum[h];
    }
    SyncNamed<256>(kBothBarrier);  // the right one's sums are there
    if constexpr (kSide == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = OwnRow() + 8 * h, row = part.row0 + r;
        if (threadIdx.x % 4 != 0 || row >= part.rows) continue;
        FinishTileRow(args_.p, segment, part, workspace, Slot(part), r, rows_.maximum[h],
                      rows_.sum[h] + shared_.sum[r], &shared_.factor[r]);
      }
    }
    SyncNamed<256>(kBothBarrier);  // the factors are there, and the sums have been read
  }

  const Arguments& args_;
  Shared<C>& shared_;
  TileCount at_;
  Rows rows_;
  uint64_t query_;
  float scale_;  // to base 2
  bool positive_;
};

}  // namespace fastattn::cuda::mla_attention
