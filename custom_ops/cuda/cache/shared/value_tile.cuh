// Up to 64 new tokens of a sequence that share a cache block, and V's way into a block that holds
// each channel's tokens together: codes gather in shared memory, token-major, and leave transposed.
#pragma once

#include <cstdint>

#include "cuda/cache/shared/block_pieces.cuh"
#include "cuda/cache/shared/head_lanes.cuh"
#include "cuda/cache/shared/seq_window.cuh"

namespace fastattn::cuda {

// A tile of one sequence: its block and the tokens [low, high) of that block that are new.
struct TileWork {
  int batch_idx;  // -1: nothing to do
  int block_index;
  int token;  // of the block's first slot; may lie before the sequence's first token
  int low, high;
};

// Tile `tile_slot` of all sequences' tiles (NumTileSlots with extra 2). All threads get the same.
// `wanted` [batch], if there is one: sequences where it is not positive have nothing to do.
__device__ __forceinline__ TileWork FindTile(const SeqMeta& seqs, int tile_slot,
                                             float seqs_per_tile, const int* wanted = nullptr) {
  TileWork work = {-1, 0, 0, 0, 0};
  if (seqs.batch == 0) return work;
  const SeqWindow window = LoadWindow(seqs, static_cast<int>(tile_slot * seqs_per_tile));
  int lane_wanted = 1;  // asked for with the window: most tiles may be of such sequences
  if (wanted != nullptr) {
    lane_wanted = wanted[min(window.low + static_cast<int>(threadIdx.x & 31), seqs.batch - 1)];
  }
  const int batch_idx = PickSeq(seqs, window, tile_slot, kBlockSize, 2);
  if (batch_idx < 0) return work;
  if (wanted != nullptr) {
    const int lane = batch_idx - window.low;
    const bool near = lane >= 0 && lane < 32;
    if ((near ? __shfl_sync(kFullWarp, lane_wanted, lane) : wanted[batch_idx]) <= 0) return work;
  }
  const SeqFacts facts = FactsOf(seqs, window, batch_idx);
  if (facts.first < 0) return work;
  const int count = WrittenCount(facts.first, facts.end, facts.count, seqs.num_tokens);
  const int start = max(facts.start, 0);
  const int tile = tile_slot - (facts.first / kBlockSize + 2 * batch_idx);
  // The block's first slot, counted from the sequence's first token.
  const int base = tile * kBlockSize - start % kBlockSize;
  work.low = max(-base, 0);
  work.high = min(count - base, kBlockSize);
  work.block_index = start / kBlockSize + tile;
  work.token = facts.first + base;
  if (work.high > work.low) work.batch_idx = batch_idx;
  return work;
}

// A lane's share of a tile's tokens, kPasses of them, kTokens slots apart: what row(token) gives,
// all of it asked for before the first value is used. owned[i]: the i-th is of this sequence.
template <typename Lane, int kTokens, int kPasses, typename Row>
__device__ __forceinline__ void LoadTile(const SeqMeta& seqs, const TileWork& work, int first_slot,
                                         Row&& row, uint32_t (&words)[kPasses][Lane::kWords],
                                         bool (&owned)[kPasses]) {
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int slot = i * kTokens + first_slot;
    const int token = work.token + slot;
    owned[i] = slot >= work.low && slot < work.high;
    if (owned[i] && seqs.batch_id_per_token != nullptr) {
      owned[i] = seqs.batch_id_per_token[token] == work.batch_idx;
    }
    if (owned[i] && Lane::IsActive(threadIdx.x % Lane::kLanes)) {
      LoadHalves<Lane::kWords, Lane::kDistance>(row(token), words[i]);
    }
  }
}

// V of one block in shared memory.
template <int kHeadDim>
struct ValueTile : TokenMajorTile<kHeadDim> {
  alignas(16) uint8_t valid[kBlockSize];  // 1: this token is new
};

// Shared memory of a kernel whose CTAs use it for one thing or another.
template <int kBytes>
__device__ __forceinline__ char* SharedBytes() {
  __shared__ alignas(16) char space[kBytes];
  return space;
}

// The bytes of a piece whose tokens are new (flags: a byte a token, 1 where it is), a word or half
// a word at a time where neighbours are.
__device__ __forceinline__ void StoreNewTokens(uint8_t* out, uint4 piece, uint4 flags) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
  const uint32_t valid[4] = {flags.x, flags.y, flags.z, flags.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    // Tokens 2w, 2w + 1, 2w + 8, 2w + 9 of the group.
    const uint32_t pairs = __byte_perm(valid[w / 2], valid[w / 2 + 2], w % 2 ? 0x7632 : 0x5410);
    if (pairs == 0x01010101u) {
      *reinterpret_cast<uint32_t*>(out + 4 * w) = words[w];
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = pairs >> (16 * half) & 0xFFFFu;
      const uint32_t codes = words[w] >> (16 * half);
      uint8_t* to = out + 4 * w + 2 * half;
      if (pair == 0x0101u) {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes);
      } else {
        if (pair & 0x0001u) to[0] = static_cast<uint8_t>(codes);
        if (pair & 0x0100u) to[1] = static_cast<uint8_t>(codes >> 8);
      }
    }
  }
}

// Stores a tile's new tokens into a block whose channels are `row` bytes apart (in kFastDeploy's
// order: as that says). A thread turns 4 channels x 16 tokens into four pieces of 16 bytes. A group
// of 16 tokens that is not wholly new is written by the byte, so that what other steps wrote beside
// it stays.
template <CacheLayout kLayout, int kHeadDim>
__device__ __forceinline__ void StoreValueTile(const ValueTile<kHeadDim>& tile, uint8_t* plane,
                                               int64_t row) {
  const int group = threadIdx.x % 4;        // tokens [16 group, +16)
  const int channel = threadIdx.x / 4 * 4;  // channels [channel, +4)
  if (channel >= kHeadDim) return;
  const uint4 flags = *reinterpret_cast<const uint4*>(tile.valid + 16 * group);
  if ((flags.x | flags.y | flags.z | flags.w) == 0) return;
  uint4 pieces[4];  // [channel]
  GatherPieces<kHeadDim>(tile, channel, group, pieces);
  const bool whole = (flags.x & flags.y & flags.z & flags.w) == 0x01010101u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint8_t* out = plane;
    if constexpr (kLayout == CacheLayout::kFastattn) {
      out += (channel + i) * row + group * 16;
    } else {
      out += ValuePiece<kLayout, kHeadDim>(channel + i, group);
    }
    if (whole) {
      *reinterpret_cast<uint4*>(out) = pieces[i];
    } else {
      StoreNewTokens(out, pieces[i], flags);
    }
  }
}

}  // namespace fastattn::cuda
