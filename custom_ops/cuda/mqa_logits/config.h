// Shapes, shared memory and barriers of the Hopper kernel.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/mqa_logits/variant.h"

namespace fastattn::cuda::mqa_logits {

inline constexpr int kDim = 128;
inline constexpr int kTileKeys = 64;  // rows of a product
inline constexpr int kMostQueries = 32;

template <IndexerQuant kQuantValue, bool kPagedValue, int kHeadsValue, int kColumnsValue>
struct Config {
  static constexpr IndexerQuant kQuant = kQuantValue;
  static constexpr bool kFp8 = kQuant == IndexerQuant::kFp8;
  static constexpr bool kPaged = kPagedValue;
  static constexpr int kHeads = kHeadsValue;
  static constexpr int kColumns = kColumnsValue;
  static constexpr int kQueries = kColumns / kHeads;
  static_assert(kColumns % kHeads == 0 && kQueries <= kMostQueries);
  // Accumulators of 256 columns are those of two products, one of which runs while the other's
  // are summed up.
#if defined(LOGITS_ONE)
  static constexpr int kProducts = 1;
#else
  static constexpr int kProducts = kColumns == 256 ? 2 : 1;
#endif
#if defined(LOGITS_ORDER)
  static constexpr bool kOrdered = kColumns == 256;
#else
  static constexpr bool kOrdered = false;
#endif
  static constexpr int kProductColumns = kColumns / kProducts;
  static constexpr int kProductQueries = kProductColumns / kHeads;
  static constexpr int kCodeBytes = kFp8 ? kDim : kDim / 2;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kStages = kFp8 ? 14 : 24;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  // 64 K registers for 128 threads of the producer and 256 of the consumers.
  static constexpr int kProducerRegisters = kFp8 ? 40 : 56;
  static constexpr int kConsumerRegisters = kFp8 ? 232 : 224;
};

// Tiles of a group that a CTA scores: keys 64 * tile and on.
struct Segment {
  int row;
  int rows;
  int sequence;
  int tile;
  int tiles;  // -1: there are no more segments
};

// What a consumer needs of a query: the visible keys, and where the logit of key 0 would be.
struct alignas(16) QueryCells {
  int begin, end;
  float* origin;
};

template <class C>
struct Shared {
  alignas(1024) uint8_t query[2][C::kColumns * kDim];
  alignas(1024) uint8_t key[C::kStages][kTileKeys * C::kCodeBytes];
  alignas(128) uint8_t scales[C::kStages][kTileKeys * kLogitsScaleBytes];
  alignas(16) float weights[2][C::kColumns];
  QueryCells cells[2][C::kQueries];
  uint64_t magnitudes[16];          // mxfp4: e4m3 codes of the magnitudes of E2M1, by shift
  int wide[2];                      // mxfp4: a head of these queries is no row of e4m3
  uint32_t unassigned[C::kStages];  // a bit for every 8 keys of the tile
  Segment segments[2];
  int64_t warp_sums[C::kThreads / 32];
  int64_t total;
  int first_group, first_tile;  // of this CTA's share
  uint64_t turn[2];
  uint64_t segment_found[2];
  uint64_t query_full[2];
  uint64_t query_empty[2];
  uint64_t key_full[C::kStages];
  uint64_t key_empty[C::kStages];
};

}  // namespace fastattn::cuda::mqa_logits
