// Compile-time choices of the Hopper prefill kernel, and what its warpgroups share.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <cstdint>

#include "params/attention.h"
#include "params/block_planes.h"

namespace fastattn::cuda::wgmma_fp8 {

// P is exp2(score - shift), with the shift kLogPeak below the maximum of the row's scores: P lies
// in [0, kPeak] before its cast to e4m3, so that few small ones underflow and none saturates.
inline constexpr float kLogPeak = 8.0f;
inline constexpr float kPeak = 256.0f;

// The queries of a tile are kQueries tokens of one head; a step covers kKeys keys, two blocks.
template <int kDim_, bool kTokenScales_, bool kSoftcap_, DType kCodes_ = DType::kE4M3,
          bool kTwoLevel_ = true>
struct Config {
  static constexpr int kDim = kDim_;
  static constexpr DType kCodes = kCodes_;             // of K and V
  static constexpr bool kTokenScales = kTokenScales_;  // K and V have a scale for each token
  static constexpr bool kSoftcap = kSoftcap_;
  // Each step's P * V starts from zero and is added in fp32: the tensor core's own sum of FP8
  // products keeps 14 bits.
  static constexpr bool kTwoLevel = kTwoLevel_;
  static constexpr int kStages = 5;
  static constexpr int kKeyBytes = 0;  // TileWalk takes all heads at once
  // Where P * V of the step before is issued and added: ahead of the step's scores, while the
  // tensor cores find those, or behind them, among the exponentials. With token scales, whose
  // products stand among the exponentials too, the first is faster, else the second; a softcap
  // needs the registers of P * V for itself.
  static constexpr bool kValuesFirst = kTokenScales || kSoftcap;

  static constexpr int kConsumers = 2;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = 2 * kBlockSize;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kCleaners = 3;    // warps of the producer warpgroup that load nothing
  static constexpr int kOut = kDim / 2;  // output registers of a thread
  static constexpr int kScores = kKeys / 2;
};

// A tile of queries, found by the producer.
struct Tile {
  int row;
  int head;
  int kv_head;
  int token;      // of the step: the first query
  int queries;    // that exist
  int position;   // of the first query among the row's keys
  int k_len;      // keys of the row, paged ones as far as the block table reaches
  int key_token;  // contiguous keys: the row's first
  int key_block;  // contiguous keys: the row's first block of transposed values
  int steps;      // at least 1; -1: no more tiles
  int last;       // step index (position / kKeys) of the first step; they go downwards
  int common_lo;  // keys that every query of the tile sees, mask_offsets apart
  int common_hi;
};

// Flags of a stage.
inline constexpr int kUnassigned = 1;  // << 0, 1: no such block; its keys are hidden
inline constexpr int kClean = 4;       // some query may see a part of the step only
inline constexpr int kAfterClean = 8;  // that goes for the tile's step before

// An output counts in units of V's largest token scale, but not of one below it.
inline constexpr float kLeastUnit = 1e-18f;

// What an output is multiplied with when its unit changes. It is finite: an output of 0 stays 0.
__device__ __forceinline__ float RatioOfUnits(float before, float now) {
  return fminf(before / now, 3.4e38f);
}

// Position in a ring of buffers.
template <int kSize>
struct Ring {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++index == kSize) {
      index = 0;
      phase ^= 1;
    }
  }
};

// A row (sequence) with queries for this kernel.
struct ActiveSeq {
  int row;
  int token;
  int q_len;
  int k_len;
};

inline constexpr int kMaxActiveSeqs = 256;

// How far a CTA's loader has come (see TileWalk).
struct WalkState {
  int round;
  int count;     // active rows listed
  int next_row;  // after them
  int section;
  int sections;
  int level;
  int start;  // tiles of the sections and levels ahead
  bool by_items;
  // Of an item whose second tile comes next: its listed row, head and that tile (-1: none does).
  int slot;
  int head;
  int second;
};

template <class C>
struct alignas(1024) Shared {
  static constexpr bool kFindAgain = false;  // threads keep what follows from their lanes
  uint8_t query[2][C::kQueries * C::kDim];
  uint8_t key[C::kStages][C::kKeys * C::kDim];
  uint8_t value[C::kStages][C::kKeys * C::kDim];
  // Token scales: as loaded (fp32 or bf16), and as used: fp32, those of V over the step's largest.
  uint8_t raw_scales[C::kTokenScales ? C::kStages : 1][2][C::kKeys * 4];
  alignas(16) float scales[C::kTokenScales ? C::kStages : 1][2][C::kKeys];
  // Tokens whose scale of K, or of V, is NaN; a bit each.
  uint32_t poisoned[C::kTokenScales ? C::kStages : 1][2][C::kKeys / 32];
  // V's largest scale, and the step before's over it. With kClean: -1, and the largest scale of the
  // last step without.
  float reference[C::kTokenScales ? C::kStages : 1][2];
  float row_unit[C::kTokenScales ? C::kQueries : 1];  // of a query's output, behind kClean
  // Tokens of a stage whose value is NaN, by channel; a bit each, 16 tokens a word.
  alignas(16) uint16_t nan_tokens[C::kStages][C::kDim][C::kKeys / 16];
  alignas(4) uint8_t nan_found[C::kStages][4];  // by each cleaner
  int flags[C::kStages];                        // for the consumers, with the keys
  int value_flags[C::kStages];                  // the same for the cleaners, with the values
  Tile tile[2];
  float factor[2][C::kQueries];  // what turns a query's products into scores in units of log2
  int2 visible[2][C::kQueries];  // first key that a query sees, and the one after its last
  float output_scale[2];         // constant factor of the outputs
  float sink[2];                 // -inf: none
  ActiveSeq seqs[kMaxActiveSeqs];
  WalkState walk;
  uint64_t tile_found[2];
  uint64_t query_full[2];
  uint64_t query_empty[2];
  uint64_t key_full[C::kStages];
  uint64_t key_empty[C::kStages];
  uint64_t value_full[C::kStages];
  uint64_t value_ready[C::kStages];
  uint64_t value_empty[C::kStages];
};

// Contiguous values are transposed into blocks of 64 tokens first. The blocks of row b begin here:
// rows never share one, and no prefix sum is needed.
__host__ __device__ constexpr int FirstBlock(int key_token, int row) {
  return key_token / kBlockSize + row;
}

struct Arguments {
  CUtensorMap query;       // [T, H, D]: boxes of 64 tokens
  CUtensorMap key;         // paged: [planes, 64, D], else [KV, tokens, D]; boxes of 64 tokens
  CUtensorMap value;       // [planes, D, 64]; boxes of a block
  BlockPlanes key_planes;  // paged
  BlockPlanes value_planes;
  int value_blocks;
  AttentionParams p;
  int min_query_tokens;
};

}  // namespace fastattn::cuda::wgmma_fp8
