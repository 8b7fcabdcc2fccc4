// Compile-time choices of the 16-bit kernel, and what its warpgroups share.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>

#include "common/head_dims.h"
#include "cuda/attention/wgmma_sm90/common/pipeline_state.h"
#include "cuda/attention/wgmma_sm90/common/work_tile.h"
#include "params/attention.h"
#include "params/block_planes.h"

namespace fastattn::cuda::wgmma_q16 {

using namespace wgmma_sm90;  // what the Hopper kernels share

// What K and V are in memory.
enum class Source : int {
  k16Bit,         // 16-bit values, tokens as rows
  kRaggedCodes,   // 8-bit codes, tokens as rows
  kPagedCodes,    // 8-bit codes, tokens of K as rows, and channels of V
  kPagedNibbles,  // the same of 4-bit codes, a byte for two channels
};

// Codes of K or V of a KV tile that are to be converted come in so many parts, a stage each: of a
// large head shared memory has no room for whole ones.
__host__ __device__ constexpr int CodeParts(int head_dim) { return head_dim > 128 ? 4 : 1; }

// The queries of a work tile are kQueries tokens of one head; a KV tile is kKeys keys, two blocks,
// or one where the outputs of a large head leave registers for the scores of no more. kElement is
// the type of K as an operand of the product: 16 bits, which codes may have to be converted to, or
// the codes as they lie (kKeyCodeOperands). A query is two such codes then.
template <DType kElement_, int kDim_, Source kSource_, bool kPerTokenScales_, bool kSoftcap_>
struct Config {
  static constexpr DType kElement = kElement_;
  static constexpr int kHeadDim = kDim_;
  // Channels in shared memory: TMA fills those up with zeros that a head has not.
  static constexpr int kDim = PaddedDim(kHeadDim);
  static constexpr int kValueDim = ValueDim(kDim);
  static constexpr int kOutDim = std::min(ValueDim(kHeadDim), kValueDim);  // of the output
  static constexpr bool kLarge = kDim > 128;
  static constexpr bool kQuantized = kSource_ != Source::k16Bit;
  // Else queries over codes become fp16 values where they lie: registers are short.
  static constexpr bool kQueryInRegisters = kQuantized && !kLarge;
  static constexpr bool kKeyCodeOperands =
      kElement != DType::kBFloat16 && kElement != DType::kFloat16;
  static constexpr bool kNibbles = kSource_ == Source::kPagedNibbles;
  static constexpr bool kFiniteValues = kElement == DType::kInt8 || kNibbles;
  static constexpr bool kTokenMajorV = kSource_ != Source::kPagedCodes && !kNibbles;
  static constexpr bool kPerTokenScales = kPerTokenScales_;  // of K and V
  static constexpr bool kSoftcap = kSoftcap_;
  // Whether 4-bit codes become operands by way of nibbles.cuh, with what that is to queries.
  static constexpr bool kNibbleOperands = kNibbles && !kLarge;
  // Whether an exponent is a score times the factor of its key, and not of its query.
  static constexpr bool kColumnFactors = kNibbleOperands && !kSoftcap;
  static constexpr bool kPerChannelScales = kQuantized && !kPerTokenScales;   // they may be
  static constexpr DType kOperand = kQuantized ? DType::kFloat16 : kElement;  // of P and V

  static constexpr int kKeyStages = kKeyCodeOperands ? 3 : 2;
  static constexpr int kValueStages = kLarge || (kQuantized && !kKeyCodeOperands) ? 2 : 3;
  static constexpr int kConsumers = 2;
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kBlocks = kValueDim > 128 ? 1 : 2;  // of a KV tile
  static constexpr int kKeys = kBlocks * kBlockSize;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kHelperWarps = 3;      // warps of the producer warpgroup that load no keys
  static constexpr int kScrubWarps = 2;       // of them, those that scrub 16-bit V
  static constexpr int kOut = kValueDim / 2;  // output registers of a thread
  static constexpr int kScores = kKeys / 2;
  // An operand's tile of tokens lies as slices of 64 channels, rows of kSlice bytes.
  static constexpr int kSlice = 128;
  static constexpr int kSlices = kDim / 64;
  static constexpr int kRowBytes = kSlices * kSlice;
  static constexpr int kValueSlices = kValueDim / 64;
  static constexpr int kValueRowBytes = kValueSlices * kSlice;
  static constexpr int kKeyRowBytes = kKeyCodeOperands ? kDim : kRowBytes;
  // Bytes of a key and its value in memory.
  static constexpr int kKeyBytes = (kDim + kValueDim) * (kQuantized ? 1 : 2) / (kNibbles ? 2 : 1);
  // Whether codes of K lie as they are, and so come by TMA.
  static constexpr bool kLoadsKeyOperands = kKeyCodeOperands;
  // Stages for codes of K or V that are to be converted: those of a KV tile, or parts of them,
  // which each one warp converts.
  static constexpr int kCodeParts = kQuantized ? CodeParts(kDim) : 1;
  static constexpr int kCodeStages = kLoadsKeyOperands ? 2
                                     : kCodeParts > 1  ? 4
                                     : kQuantized      ? 3
                                                       : 1;
  static constexpr int kCodeBytes =
      kQuantized ? kKeys * kDim / (kNibbles ? 2 : 1) / kCodeParts : 128;
  static constexpr int kScaleStages = kPerTokenScales ? 4 : 1;
  static constexpr int kScaledKeys = kPerTokenScales ? kKeys : 8;
  // Scales of K lie as threads read them: those of columns 2 * q, + 1 of every eight together. A
  // gap keeps the four groups in banks of their own.
  static constexpr int kScaleGroup = kScaledKeys / 4 + 4;
};

// 16 channels more of queries and keys (NibbleQuery), eight rows of eight channels together.
template <class C, bool kExist = C::kNibbleOperands>
struct BiasChannels {};
template <class C>
struct BiasChannels<C, true> {
  alignas(1024) uint16_t query_bias[C::kConsumers][64 * 16];
  uint16_t key_bias[C::kKeys * 16];
};

template <class C>
struct alignas(1024) Shared : BiasChannels<C> {
  static constexpr bool kRecomputeLane = true;  // registers are short
  uint8_t query[C::kQueries * C::kRowBytes];    // [consumer][slice][64 tokens][128]
  // [slice][kKeys tokens][128]; codes: [kKeys tokens][D]
  uint8_t key[C::kKeyStages][C::kKeys * C::kKeyRowBytes];
  // [slice][kKeys tokens][128] or [block][D channels][128]
  uint8_t value[C::kValueStages][C::kKeys * C::kValueRowBytes];
  // Eight columns of values for RowSums, swizzled: 16 of 1 each, and then 48 of 0.
  alignas(1024) uint16_t ones[C::kQuantized ? 512 : 1];
  alignas(128) uint8_t codes[C::kCodeStages][C::kCodeBytes];
  // Tokens of a stage whose value is not finite, by channel; a bit each, 16 tokens a word. Words
  // of a side warp that found none hold anything.
  alignas(16) uint16_t
      nan_tokens[C::kFiniteValues ? 1 : C::kValueStages][C::kValueDim][C::kKeys / 16];
  alignas(4) uint8_t nan_found[C::kValueStages][4];  // by each helper warp
  alignas(16) float key_scales[C::kScaleStages][4][C::kScaleGroup];
  // Relative to common_v_scale; with kNeedsScrub: their mantissas alone, and the exponents.
  alignas(16) __half value_scales[C::kScaleStages][C::kScaledKeys];
  alignas(4) uint8_t value_exponents[C::kScaleStages][C::kScaledKeys];
  // What outputs are relative to since the last KV tile without kNeedsScrub, this one or one
  // before; with kNeedsScrub the sign is negative.
  float common_v_scale[C::kScaleStages];
  uint32_t poisoned[C::kScaleStages][C::kKeys / 32];  // tokens whose scale of V is not finite
  float v_scale_ratio[C::kScaleStages];  // that of the iteration before over this one's
  float v_scale[2];                      // of the work tile's last iteration so far
  int poison_found[C::kScaleStages];
  int flags[C::kKeyStages];          // for the consumers, with the keys
  int value_flags[C::kValueStages];  // the same for the scrubbing warps, with the values
  int code_flags[C::kCodeStages];    // for the converters
  WorkTile tile[2];
  int blocks[2][2][32];              // of a work tile's next 2 * kBlockLookups iterations
  float factor[2][C::kQueries];      // what turns a query's products into scores in units of log2
  int2 visible[2][C::kQueries];      // first key that a query sees, and the one after its last
  int2 unmasked[4 * C::kConsumers];  // keys that all queries of a consumer's warp see
  alignas(16) float key_channels[2][C::kPerChannelScales ? C::kDim : 4];  // if K has them
  alignas(16) float value_channels[2][C::kPerChannelScales ? C::kDim : 4];
  float output_scale[2];  // constant factor of the outputs
  float sink[2];          // -inf: none
  ActiveSeq seqs[kMaxActiveSeqs];
  SchedulerState scheduler;
  int empty_phase[2];  // codes: the phase that the loader waits for next
  int converter_tiles[C::kHelperWarps];
  uint64_t tile_found[2];
  uint64_t query_full[2];  // codes: [0], of all consumers; 16 bits: of each
  uint64_t query_empty[2];
  uint64_t query_read;
  uint64_t query_done[2];  // 16 bits: of a consumer
  uint64_t key_full[C::kKeyStages];
  uint64_t key_empty[C::kKeyStages];
  uint64_t value_full[C::kValueStages];
  uint64_t value_ready[C::kValueStages];
  uint64_t value_empty[C::kValueStages];
  uint64_t codes_full[C::kCodeStages];
  uint64_t codes_empty[C::kCodeStages];
  uint64_t scale_full[C::kScaleStages];
  uint64_t scale_empty[C::kScaleStages];
};

// Tensors of bytes. 16-bit values are copied in boxes of 64 tokens x 128 bytes of a head, codes in
// boxes of a block of a head.
struct Arguments {
  CUtensorMap query;       // [T, H, 2 D]
  CUtensorMap key;         // paged: [planes, 64, bytes], else [KV, tokens, bytes]
  CUtensorMap value;       // the same; paged codes: [planes, D, 64]
  BlockPlanes key_planes;  // paged
  BlockPlanes value_planes;
  AttentionParams p;
  int min_query_tokens;
};

}  // namespace fastattn::cuda::wgmma_q16
