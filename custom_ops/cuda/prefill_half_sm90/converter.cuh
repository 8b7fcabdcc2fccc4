// Codes become 16-bit operands: three warps of the producer warpgroup take the blocks of K and V in
// turn, each from buffers of its own.
#pragma once

#include <type_traits>

#include "common/numeric.h"
#include "cuda/attention/format.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/prefill_half_sm90/clean.cuh"
#include "cuda/prefill_half_sm90/config.h"
#include "cuda/prefill_half_sm90/factors.cuh"

namespace fastattn::cuda::prefill_half_sm90 {

template <class C>
class Converter {
 public:
  __device__ Converter(const Arguments& arguments, Shared<C>& shared)
      : p_(arguments.p), shared_(shared), warp_(threadIdx.x / 32 - 1), lane_(threadIdx.x % 32) {}

  __device__ void Run() {
    const DType codes = p_.paged ? p_.cache.dtype : p_.packed.dtype;
    if (codes == DType::kInt8) {
      RunFormat<Format<DType::kInt8>>();
    } else if (codes == DType::kE4M3) {
      RunFormat<Format<DType::kE4M3>>();
    } else {
      RunFormat<Format<DType::kE5M2>>();
    }
  }

 private:
  // The blocks of a tile come in the loader's order.
  template <class F>
  __device__ __forceinline__ void RunFormat() {
    Ring<2> tiles;
    while (true) {
      Wait(&shared_.tile_found[tiles.index], tiles.phase);
      const Tile& tile = shared_.tile[tiles.index];
      const int steps = tile.steps, last = tile.last, k_len = tile.k_len;
      if (steps >= 0) FindFactors<C>(p_, shared_, tile, tiles.index, warp_);
      __syncwarp();
      if (lane_ == 0) {
        Arrive(&shared_.query_full[tiles.index]);
        Arrive(&shared_.query_empty[tiles.index]);
      }
      if (steps < 0) return;
      tiles.Advance();
#pragma unroll 1
      for (int step = -1; step < steps; ++step) {
        if (step + 1 < steps) {
#pragma unroll 1
          for (int block = 0; block < 2; ++block) {
            if (IsMine()) ConvertKeys<F>(block);
          }
          keys_.Advance();
        }
        if (step < 0) continue;
#pragma unroll 1
        for (int block = 0; block < 2; ++block) {
          if (IsMine()) ConvertValues<F>(block, k_len - (last - step) * C::kKeys);
        }
        values_.Advance();
      }
    }
  }

  __device__ bool IsMine() {
    const bool mine = turn_ == warp_;
    turn_ = turn_ == C::kSideWarps - 1 ? 0 : turn_ + 1;
    return mine;
  }

  __device__ int RawSlot() const { return warp_ + C::kSideWarps * raw_.index; }

  template <class F>
  __device__ __forceinline__ void ConvertKeys(int block) {
    const int at = keys_.index, slot = RawSlot();
    Wait(&shared_.raw_full[slot], raw_.phase);
    Wait(&shared_.key_empty[at], keys_.phase ^ 1);
    ConvertRows<F>(shared_.raw[slot], shared_.key[at] + block * kBlockSize * C::kSlice);
    if (block == 0 && lane_ == 0) shared_.flags[at] = shared_.raw_flags[slot];
    Finish(slot, &shared_.key_full[at]);
  }

  template <class F>
  __device__ __forceinline__ void ConvertValues(int block, int written) {
    const int at = values_.index, slot = RawSlot();
    Wait(&shared_.raw_full[slot], raw_.phase);
    Wait(&shared_.value_empty[at], values_.phase ^ 1);
    if constexpr (C::kValueRows) {
      ConvertRows<F>(shared_.raw[slot], shared_.value[at] + block * kBlockSize * C::kSlice);
    } else {
      ConvertChannels<F>(shared_.raw[slot], shared_.value[at] + block * C::kDim * C::kSlice);
    }
    bool found = false;
    // Any int8 code is finite.
    if (!std::is_same_v<F, Format<DType::kInt8>> && (shared_.raw_flags[slot] & kClean)) {
      __syncwarp();
      ValueCleaner<C> cleaner(shared_);
      found = cleaner.Clean(at, written, 4 * block, 4 * block + 4, 1);
    }
    if (lane_ == 0) shared_.nan_found[at][block] = found;
    Finish(slot, &shared_.value_ready[at]);
  }

  // Hands the operands over, and the codes' buffer back.
  __device__ void Finish(int slot, uint64_t* full) {
    FenceAsyncProxy();
    __syncwarp();
    if (lane_ == 0) {
      Arrive(full);
      Arrive(&shared_.raw_empty[slot]);
    }
    raw_.Advance();
  }

  // 64 tokens with their channels side by side. In each eight lanes, four take one token and four
  // another: their stores meet no bank twice.
  template <class F>
  __device__ __forceinline__ void ConvertRows(const uint8_t* codes, uint8_t* target) {
    constexpr int kPieces = C::kDim / 16, kTokens = 32 / kPieces;
    const int piece = lane_ % kPieces, token = (lane_ / kPieces) ^ (piece / 4);
    const uint8_t* in = codes + token * C::kDim + 16 * piece;
    uint8_t* out = target + piece / 4 * C::kKeys * C::kSlice + token * C::kSlice;
    const int chunk = 16 * ((2 * (piece % 4)) ^ token);
#pragma unroll 2
    for (int i = 0; i < kBlockSize / kTokens; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(in + i * kTokens * C::kDim);
      uint32_t w[8];
      F::Widen(v.x, &w[0], &w[1]);
      F::Widen(v.y, &w[2], &w[3]);
      F::Widen(v.z, &w[4], &w[5]);
      F::Widen(v.w, &w[6], &w[7]);
      const int at = chunk ^ (kTokens * i % 8 * 16);
      uint8_t* row = out + i * kTokens * C::kSlice;
      *reinterpret_cast<uint4*>(row + at) = make_uint4(w[0], w[1], w[2], w[3]);
      *reinterpret_cast<uint4*>(row + (at ^ 16)) = make_uint4(w[4], w[5], w[6], w[7]);
    }
  }

  // Channels with their 64 tokens side by side, in TokenSlot order: the low pairs of a piece's
  // words are tokens 0 .. 7, the high ones 8 .. 15.
  template <class F>
  __device__ __forceinline__ void ConvertChannels(const uint8_t* codes, uint8_t* target) {
    const int piece = lane_ % 4, channel = lane_ / 4;
    const uint8_t* in = codes + 16 * lane_;
    uint8_t* out = target + channel * C::kSlice;
    const int at = 16 * ((2 * piece) ^ channel);
#pragma unroll 2
    for (int i = 0; i < C::kDim / 8; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(in + i * 8 * kBlockSize);
      uint4 low, high;
      F::Widen(v.x, &low.x, &high.x);
      F::Widen(v.y, &low.y, &high.y);
      F::Widen(v.z, &low.z, &high.z);
      F::Widen(v.w, &low.w, &high.w);
      uint8_t* row = out + i * 8 * C::kSlice;
      *reinterpret_cast<uint4*>(row + at) = low;
      *reinterpret_cast<uint4*>(row + (at ^ 16)) = high;
    }
  }

  const AttentionParams& p_;
  Shared<C>& shared_;
  const int warp_;  // 0 .. kSideWarps - 1
  const int lane_;
  int turn_ = 0;  // whose the next block is
  Ring<C::kKeyStages> keys_;
  Ring<C::kValueStages> values_;
  Ring<2> raw_;
};

}  // namespace fastattn::cuda::prefill_half_sm90
