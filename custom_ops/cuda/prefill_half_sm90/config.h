// Compile-time choices of the 16-bit Hopper prefill kernel, and what its warpgroups share.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <cstdint>

#include "cuda/prefill_sm90/config.h"
#include "params/attention.h"

namespace fastattn::cuda::prefill_half_sm90 {

using prefill_sm90::ActiveRow;
using prefill_sm90::kClean;
using prefill_sm90::kUnassigned;
using prefill_sm90::Ring;
using prefill_sm90::Tile;
using prefill_sm90::WalkState;

// What K and V are in memory.
enum class Source : int {
  kOperands,  // 16-bit values, tokens as rows
  kCodeRows,  // 8-bit codes, tokens as rows
  kCodes,     // 8-bit codes, tokens of K as rows, and channels of V
};

// The queries of a tile are kQueries tokens of one head; a step covers kKeys keys, two blocks.
template <DType kOperand_, int kDim_, Source kSource_, bool kTokenScales_>
struct Config {
  static constexpr DType kOperand = kOperand_;  // of both products
  static constexpr int kDim = kDim_;
  static constexpr bool kCodes = kSource_ != Source::kOperands;
  static constexpr bool kValueRows = kSource_ != Source::kCodes;
  static constexpr bool kTokenScales = kTokenScales_;  // K and V have a scale for each token

  static constexpr int kKeyStages = 2;
  static constexpr int kValueStages = kCodes ? 2 : 3;
  static constexpr int kConsumers = 2;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kKeys = 2 * kBlockSize;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kSideWarps = 3;   // warps of the producer warpgroup that load no keys
  static constexpr int kCleaners = 2;    // those of operands that look at values
  static constexpr int kOut = kDim / 2;  // output registers of a thread
  static constexpr int kScores = kKeys / 2;
  // An operand's tile of tokens lies as one or two slices of 64 channels, rows of kSlice bytes.
  static constexpr int kSlice = 128;
  static constexpr int kSlices = kDim / 64;
  static constexpr int kRowBytes = kSlices * kSlice;
  // Of a key and its value in memory.
  static constexpr int kKeyBytes = 2 * kDim * (kCodes ? 1 : 2);
  // Codes of one block of K or V; every converting warp has two such buffers.
  static constexpr int kRawSlots = kCodes ? 2 * kSideWarps : 1;
  static constexpr int kRawBytes = kCodes ? kBlockSize * kDim : 128;
  static constexpr int kScaleSlots = kTokenScales ? 4 : 1;
  static constexpr int kScaledKeys = kTokenScales ? kKeys : 2;
};

template <class C>
struct alignas(1024) Shared {
  uint8_t query[C::kQueries * C::kRowBytes];                // [consumer][slice][64 tokens][128]
  uint8_t key[C::kKeyStages][C::kKeys * C::kRowBytes];      // [slice][128 tokens][128]
  uint8_t value[C::kValueStages][C::kKeys * C::kRowBytes];  // the same, or [block][D channels][128]
  alignas(128) uint8_t raw[C::kRawSlots][C::kRawBytes];
  // Tokens of a stage whose value is not finite, by channel; a bit each, 16 tokens a word. Words
  // of a side warp that found none hold anything.
  alignas(16) uint16_t nan_tokens[C::kValueStages][C::kDim][C::kKeys / 16];
  alignas(4) uint8_t nan_found[C::kValueStages][4];  // by each side warp, or in each block
  // Token scales in fp32, those of V in units of the reference.
  alignas(16) float scales[C::kScaleSlots][2][C::kScaledKeys];
  uint32_t poisoned[C::kScaleSlots][C::kKeys / 32];  // tokens whose scale of V is not finite
  float2 reference[C::kScaleSlots];  // unit of V's scales; the step before's over it
  int poison_found[C::kScaleSlots];
  int flags[C::kKeyStages];          // for the consumers, with the keys
  int value_flags[C::kValueStages];  // the same for the cleaners, with the values
  int raw_flags[C::kRawSlots];       // for the converters
  Tile tile[2];
  int blocks[2][32];             // operands: of a tile's first 16 steps
  float factor[2][C::kQueries];  // what turns a query's scores into units of log2 (of the softcap)
  int2 visible[2][C::kQueries];  // first key that a query sees, and the one after its last
  float output_scale[2];         // constant factor of the outputs
  float sink[2];                 // -inf: none
  ActiveRow rows[prefill_sm90::kMaxActiveRows];
  WalkState walk;
  uint64_t tile_found[2];
  uint64_t query_full[2];  // of a tile; operands: of a consumer
  uint64_t query_empty[2];
  uint64_t query_read;
  uint64_t query_done[2];  // operands: of a consumer
  uint64_t key_full[C::kKeyStages];
  uint64_t key_empty[C::kKeyStages];
  uint64_t value_full[C::kValueStages];
  uint64_t value_ready[C::kValueStages];
  uint64_t value_empty[C::kValueStages];
  uint64_t raw_full[C::kRawSlots];
  uint64_t raw_empty[C::kRawSlots];
  uint64_t scale_full[C::kScaleSlots];
  uint64_t scale_empty[C::kScaleSlots];
};

// Tensors of bytes. Operands come in boxes of 64 tokens x 128 bytes of a head, codes in those of a
// block of a head.
struct Arguments {
  CUtensorMap query;  // [T, H, 2 D]
  CUtensorMap key;    // paged: [blocks * KV, 64, bytes], else [KV, tokens, bytes]
  CUtensorMap value;  // the same; paged codes: [blocks * KV, D, 64]
  AttentionParams p;
  int min_query_tokens;
};

}  // namespace fastattn::cuda::prefill_half_sm90
