// Shapes, shared memory and barriers of the Hopper kernel.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/mqa_logits/variant.h"
#include "plan/mqa_logits.h"

namespace fastattn::cuda::mqa_logits {

inline constexpr int kDim = kLogitsDim;
inline constexpr int kTileKeys = kLogitsTileKeys;  // rows of a product
inline constexpr int kMostQueries = 32;
inline constexpr int kMostWhole = 128;    // tiles of a CTA up to which one group is better than two
inline constexpr int kKnownGroups = 128;  // of a step, whose lengths a warp has in registers

template <IndexerQuant kQuantValue, bool kPagedValue, int kHeadsValue, int kColumnsValue>
struct Config {
  static constexpr IndexerQuant kQuant = kQuantValue;
  static constexpr bool kFp8 = kQuant == IndexerQuant::kFp8;
  static constexpr bool kPaged = kPagedValue;
  static constexpr int kHeads = kHeadsValue;
  static constexpr int kColumns = kColumnsValue;
  static constexpr int kQueries = kColumns / kHeads;
  static_assert(kColumns % kHeads == 0 && kQueries <= kMostQueries);
  static constexpr int kCodeBytes = kFp8 ? kDim : kDim / 2;
  // Warpgroups: as many as their accumulators, weights and operands leave registers for. A tile of
  // few columns is a chain of short steps, which only other tiles' hide.
  static constexpr int kConsumers = kColumns == 64 ? 4 : kColumns == 128 ? 3 : 2;
  // A stage's tiles are all of one warpgroup: its waits see every phase of the stage's barrier. A
  // warpgroup that came to a stage for the first time after others' turns could take the phase
  // before the one that it waits for, still loading, for it: waits tell phases by parity only.
  static constexpr int kStages = !kFp8 ? 24 : kConsumers == 4 ? 16 : kConsumers == 3 ? 15 : 14;
  static_assert(kStages % kConsumers == 0);
  // Tiles of pages that are asked for at once, each in lanes of its own: one after the other they
  // would take a warp longer than tiles of 64 columns take the consumers.
  static constexpr int kBatch = kStages == 15 ? 3 : kFp8 ? 4 : 8;
  static_assert(!kPaged || kStages % kBatch == 0);
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // A stage: the codes of its keys, where they are MXFP4's their scales behind them as in a page of
  // kTileKeys tokens, so that one copy brings both.
  static constexpr int kScaleBytes = kTileKeys * kLogitsScaleBytes;
  static constexpr int kStageBytes = kTileKeys * kCodeBytes + (kFp8 ? 0 : kScaleBytes);
  // Of a thread at the launch (all that there are), then of the producer's and the consumers':
  // these wait forever for registers that the launch did not take.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kConsumers == 4           ? 64
                                            : kConsumers == 3 && kFp8 ? 80
                                                                      : 56;
  static constexpr int kConsumerRegisters = kConsumers == 4   ? 104
                                            : kConsumers == 2 ? 224
                                            : kFp8            ? 144
                                                              : 152;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * kRegisters);
  // How much more work, of the average, than in equal shares a CTA may have for the sake of tiles
  // of one group only (FindKnownShare).
  static constexpr float kWholeSlack = kFp8 ? 1.0f / 16 : 1.0f / 64;
  // Work of a CTA on a group of queries besides its tiles, in tiles: ranges, weights and operands
  // are read one after the other, and hidden only behind the tiles of other groups.
  static constexpr int kGroupUnits = kPaged ? 1 : kFp8 ? 2 : 4;
};

// Tiles of a group that a CTA scores: keys 64 * tile and on.
struct Segment {
  int row;
  int rows;
  int sequence;
  int tile;
  int tiles;  // -1: there are no more segments
};

// Tiles that some row of a group sees.
struct TileRange {
  int begin, end;
};

// Units of work (schedule.cuh) of a CTA: the first is unit `unit` of group `group`.
struct Share {
  int group, unit;
  int units;
  TileRange tiles;  // of that group; paged only
};

// What a consumer needs of a query: the visible keys, and where the logit of key 0 would be.
struct alignas(16) QueryCells {
  int begin, end;
  float* origin;
};

template <class C>
struct Shared {
  alignas(1024) uint8_t query[2][C::kColumns * kDim];
  alignas(1024) uint8_t key[C::kStages][C::kStageBytes];
  alignas(128) uint8_t fp8_scales[C::kFp8 ? C::kStages : 1][C::kScaleBytes];
  alignas(16) float weights[2][C::kColumns];
  QueryCells cells[2][C::kQueries];
  uint64_t magnitudes[16];          // mxfp4: e4m3 codes of the magnitudes of E2M1, by shift
  int wide[2];                      // mxfp4: a head of these queries is no row of e4m3
  uint32_t unassigned[C::kStages];  // a bit for every 8 keys of the tile
  Segment segments[2];
  int group_tiles[C::kPaged ? kKnownGroups : 1];  // of a step, where Lengths knows them
  int warp_sums[C::kThreads / 32];
  Share share;  // ragged
  uint64_t segment_found[2];
  uint64_t query_full[2];
  uint64_t query_empty[2];
  uint64_t key_full[C::kStages];
  uint64_t key_empty[C::kStages];

  __device__ __forceinline__ uint8_t* Scales(int stage) {
    return C::kFp8 ? fp8_scales[stage] : key[stage] + kTileKeys * C::kCodeBytes;
  }
};

}  // namespace fastattn::cuda::mqa_logits
