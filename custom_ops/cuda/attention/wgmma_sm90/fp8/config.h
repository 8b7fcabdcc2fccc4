// Compile-time choices of the FP8 kernel, and what its warpgroups share.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>

#include "common/head_dims.h"
#include "cuda/attention/wgmma_sm90/common/pipeline_state.h"
#include "cuda/attention/wgmma_sm90/common/work_tile.h"
#include "params/attention.h"
#include "params/block_planes.h"

namespace fastattn::cuda::wgmma_fp8 {

using namespace wgmma_sm90;  // what the Hopper kernels share

// The queries of a work tile are kQueries tokens of one head; a KV tile is kKeys keys, two blocks.
template <int kDim_, bool kPerTokenScales_, bool kSoftcap_, DType kKvType_ = DType::kE4M3,
          bool kTwoLevel_ = true>
struct Config {
  static constexpr int kHeadDim = kDim_;
  // Channels in shared memory: TMA fills those up with zeros that a head has not.
  static constexpr int kDim = PaddedDim(kHeadDim);
  static constexpr int kValueDim = ValueDim(kDim);
  static constexpr int kOutDim = std::min(ValueDim(kHeadDim), kValueDim);  // of the output
  static constexpr DType kKvType = kKvType_;                               // of K and V
  static constexpr bool kPerTokenScales = kPerTokenScales_;                // of K and V
  static constexpr bool kSoftcap = kSoftcap_;
  // Each iteration's P * V starts from zero and is added in fp32: the tensor core's own sum of FP8
  // products keeps 14 bits.
  static constexpr bool kTwoLevel = kTwoLevel_;
  static constexpr int kStages = kDim > 192 ? 2 : kDim > 128 ? (kPerTokenScales ? 3 : 4) : 5;
  // The outputs of a large head leave registers either for scores or for a product of half of its
  // channels: a consumer goes from one to the other, while the other consumer does the opposite.
  static constexpr bool kSerial = kValueDim > 128;
  static constexpr int kKeyBytes = 0;  // TileScheduler takes all heads at once
  // Where P * V of the iteration before is issued and added: ahead of the iteration's scores, while
  // the tensor cores find those, or behind them, among the exponentials. With per-token scales,
  // whose products stand among the exponentials too, the first is faster, else the second; a
  // softcap needs the registers of P * V for itself.
  static constexpr bool kValuesFirst = kPerTokenScales || kSoftcap;
  // Most iterations find no maximum, and the tensor cores sum the P * V of two (LazyConsumer).
  static constexpr bool kLazy =
      kHeadDim == 128 && kKvType == DType::kE4M3 && !kValuesFirst && kTwoLevel;

  static constexpr int kConsumers = 2;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = 2 * kBlockSize;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kScrubWarps = 3;       // warps of the producer warpgroup that load nothing
  static constexpr int kOut = kValueDim / 2;  // output registers of a thread
  // Queries and keys lie as slices of so many channels, rows of as many bytes, and a last one of 64
  // where they do not divide the head.
  static constexpr int kSlice = kDim > 128 ? 128 : kDim;
  static constexpr int kSlices = kDim / kSlice;
  static constexpr int kTail = kDim % kSlice;
  static_assert(kTail == 0 || kTail == 64);
  static constexpr int kProduct = kSerial ? kOut / 2 : kOut;  // of them, those of one product
  static constexpr int kScores = kKeys / 2;
};

// Config::kLazy: the logarithm of a row's largest P where its maximum is found. It is below
// kLogPeak, so that scores may grow before the row's shift has to move. Rows in which few keys have
// most of the weight keep kLogPeak (LazyConsumer::IsOfFewKeys).
inline constexpr float kLazyLogPeak = 5.0f;

// Outputs are relative to V's largest per-token scale, but not to one below this.
inline constexpr float kMinVScale = 1e-18f;

// What an output is multiplied with when the scale that it is relative to changes. It is finite: an
// output of 0 stays 0.
__device__ __forceinline__ float VScaleRatio(float before, float now) {
  return fminf(before / now, 3.4e38f);
}

template <class C>
struct alignas(1024) Shared {
  static constexpr bool kRecomputeLane = false;  // threads keep what follows from their lanes
  uint8_t query[2][C::kQueries * C::kDim];       // [consumer][slice][64 tokens][kSlice or kTail]
  uint8_t key[C::kStages][C::kKeys * C::kDim];   // [slice][128 tokens][kSlice or kTail]
  uint8_t value[C::kStages][C::kKeys * C::kValueDim];
  // Per-token scales as loaded (fp32 or bf16), and as used: fp32, those of V over the KV tile's
  // largest.
  uint8_t raw_scales[C::kPerTokenScales ? C::kStages : 1][2][C::kKeys * 4];
  alignas(16) float scales[C::kPerTokenScales ? C::kStages : 1][2][C::kKeys];
  // Tokens whose scale of K, or of V, is NaN; a bit each.
  uint32_t poisoned[C::kPerTokenScales ? C::kStages : 1][2][C::kKeys / 32];
  // V's largest scale, and that of the iteration before over it. With kNeedsScrub: -1, and the
  // largest scale of the last iteration without.
  float max_v_scale[C::kPerTokenScales ? C::kStages : 1][2];
  // What a row's output is relative to after a KV tile with kNeedsScrub.
  float row_v_scale[C::kPerTokenScales ? C::kQueries : 1];
  // Tokens of a stage whose value is NaN, by channel: a bit each, 16 tokens a word.
  alignas(16) uint16_t nan_tokens[C::kStages][C::kValueDim][C::kKeys / 16];
  alignas(4) uint8_t nan_found[C::kStages][4];  // by each scrubbing warp
  int flags[C::kStages];                        // for the consumers, with the keys
  int value_flags[C::kStages];                  // the same for the scrubbing warps, with the values
  WorkTile tile[2];
  float factor[2][C::kQueries];  // what turns a query's products into scores in units of log2
  int2 visible[2][C::kQueries];  // first key that a query sees, and the one after its last
  float output_scale[2];         // constant factor of the outputs
  float sink[2];                 // -inf: none
  ActiveSeq seqs[kMaxActiveSeqs];
  SchedulerState scheduler;
  uint64_t tile_found[2];
  uint64_t query_full[2];
  uint64_t query_empty[2];
  uint64_t key_full[C::kStages];
  uint64_t key_empty[C::kStages];
  uint64_t value_full[C::kStages];
  uint64_t value_ready[C::kStages];
  uint64_t value_empty[C::kStages];
  // Config::kLazy, of a work tile: iterations, from the first, that find maxima; whether it is done
  // again; the rows that have to be, votes of each consumer warp's lanes for both of their rows.
  int exact_iterations[2];
  bool is_again[2];
  uint32_t failed[2][C::kLazy ? 4 * C::kConsumers : 1][2];
};

struct Arguments {
  CUtensorMap query;       // [T, H, D]: boxes of 64 tokens
  CUtensorMap key;         // paged: [planes, 64, D], else [KV, tokens, D]; boxes of 64 tokens
  CUtensorMap value;       // [planes, D, 64]; boxes of a block
  BlockPlanes key_planes;  // paged
  BlockPlanes value_planes;
  int value_blocks;
  AttentionParams p;
  int min_query_tokens;
  CUtensorMap query_tail;  // the last channels of heads that are not whole slices
  CUtensorMap key_tail;
};

}  // namespace fastattn::cuda::wgmma_fp8
