// Compile-time choices of the 16-bit Hopper prefill kernel, and what its warpgroups share.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstdint>

#include "cuda/attention/wgmma_sm90/fp8/config.h"
#include "params/attention.h"

namespace fastattn::cuda::wgmma_fp16 {

using wgmma_fp8::ActiveSeq;
using wgmma_fp8::kClean;
using wgmma_fp8::kUnassigned;
using wgmma_fp8::Ring;
using wgmma_fp8::Tile;
using wgmma_fp8::WalkState;

// A ring as one number, where registers are short.
template <int kSize>
struct RingCount {
  int count = 0;  // modulo two rounds
  __device__ __forceinline__ int Index() const { return count < kSize ? count : count - kSize; }
  __device__ __forceinline__ uint32_t Phase() const { return count < kSize ? 0 : 1; }
  __device__ __forceinline__ void Advance() { count = count + 1 == 2 * kSize ? 0 : count + 1; }
};

// What K and V are in memory.
enum class Source : int {
  kOperands,  // 16-bit values, tokens as rows
  kCodeRows,  // 8-bit codes, tokens as rows
  kCodes,     // 8-bit codes, tokens of K as rows, and channels of V
};

// The queries of a tile are kQueries tokens of one head; a step covers kKeys keys, two blocks.
// kElement is the type of K as an operand: 16-bit values, which codes are converted to, or the
// codes as they lie. Queries are two such codes each then.
template <DType kElement_, int kDim_, Source kSource_, bool kTokenScales_, bool kSoftcap_>
struct Config {
  static constexpr DType kElement = kElement_;
  static constexpr int kDim = kDim_;
  static constexpr bool kCodes = kSource_ != Source::kOperands;
  static constexpr bool kKeyCodes = kElement != DType::kBFloat16 && kElement != DType::kFloat16;
  static constexpr bool kFiniteValues = kElement == DType::kInt8;
  static constexpr bool kValueRows = kSource_ != Source::kCodes;
  static constexpr bool kTokenScales = kTokenScales_;  // K and V have a scale for each token
  static constexpr bool kSoftcap = kSoftcap_;
  static constexpr bool kChannelScales = kCodes && !kTokenScales;  // or a scale for each channel
  static constexpr DType kOperand = kCodes ? DType::kFloat16 : kElement;  // of P and V

  static constexpr int kKeyStages = kKeyCodes ? 3 : 2;
  static constexpr int kValueStages = kCodes && !kKeyCodes ? 2 : 3;
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
  static constexpr int kKeyRowBytes = kKeyCodes ? kDim : kRowBytes;
  // Of a key and its value in memory.
  static constexpr int kKeyBytes = 2 * kDim * (kCodes ? 1 : 2);
  // Buffers for the codes of a step's K or V that are to be converted.
  static constexpr int kRawSlots = kKeyCodes ? 2 : kCodes ? 3 : 1;
  static constexpr int kRawBytes = kCodes ? kKeys * kDim : 128;
  static constexpr int kScaleSlots = kTokenScales ? 4 : 1;
  static constexpr int kScaledKeys = kTokenScales ? kKeys : 8;
  // Scales of K lie as threads read them: those of columns 2 * q, + 1 of every eight together. A
  // gap keeps the four groups in banks of their own.
  static constexpr int kScaleGroup = kScaledKeys / 4 + 4;
};

template <class C>
struct alignas(1024) Shared {
  static constexpr bool kFindAgain = true;    // registers are short
  uint8_t query[C::kQueries * C::kRowBytes];  // [consumer][slice][64 tokens][128]
  // [slice][128 tokens][128]; codes: [128 tokens][D]
  uint8_t key[C::kKeyStages][C::kKeys * C::kKeyRowBytes];
  // [slice][128 tokens][128] or [block][D channels][128]
  uint8_t value[C::kValueStages][C::kKeys * C::kRowBytes];
  // Eight columns of values for RowSums, swizzled: 16 of 1 each, and then 48 of 0.
  alignas(1024) uint16_t ones[C::kCodes ? 512 : 1];
  alignas(128) uint8_t raw[C::kRawSlots][C::kRawBytes];
  // Tokens of a stage whose value is not finite, by channel; a bit each, 16 tokens a word. Words
  // of a side warp that found none hold anything.
  alignas(16) uint16_t nan_tokens[C::kFiniteValues ? 1 : C::kValueStages][C::kDim][C::kKeys / 16];
  alignas(4) uint8_t nan_found[C::kValueStages][4];  // by each side warp
  alignas(16) float key_scales[C::kScaleSlots][4][C::kScaleGroup];
  // In units of the reference; with kClean: their mantissas alone, and the exponents.
  alignas(16) __half value_scales[C::kScaleSlots][C::kScaledKeys];
  alignas(4) uint8_t value_exponents[C::kScaleSlots][C::kScaledKeys];
  // Of V in the last step without kClean, this one or before; with it the sign is negative.
  float common_unit[C::kScaleSlots];
  uint32_t poisoned[C::kScaleSlots][C::kKeys / 32];  // tokens whose scale of V is not finite
  float unit_ratio[C::kScaleSlots];                  // V's unit of the step before over this one's
  float unit[2];                                     // of V in the tile's last step so far
  int poison_found[C::kScaleSlots];
  int flags[C::kKeyStages];          // for the consumers, with the keys
  int value_flags[C::kValueStages];  // the same for the cleaners, with the values
  int raw_flags[C::kRawSlots];       // for the converters
  Tile tile[2];
  int blocks[2][2][32];            // of two windows of a tile's steps (see FindWindow)
  float factor[2][C::kQueries];    // what turns a query's products into scores in units of log2
  int2 visible[2][C::kQueries];    // first key that a query sees, and the one after its last
  int2 common[4 * C::kConsumers];  // keys that all queries of a consumer's warp see
  alignas(16) float key_channels[2][C::kChannelScales ? C::kDim : 4];  // if K has them
  alignas(16) float value_channels[2][C::kChannelScales ? C::kDim : 4];
  float output_scale[2];  // constant factor of the outputs
  float sink[2];          // -inf: none
  ActiveSeq seqs[wgmma_fp8::kMaxActiveSeqs];
  WalkState walk;
  int empty_phase[2];  // codes: that the loader waits for next
  int converter_tiles[C::kSideWarps];
  uint64_t tile_found[2];
  uint64_t query_full[2];  // of all consumers; operands: of each
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
  CUtensorMap query;       // [T, H, 2 D]
  CUtensorMap key;         // paged: [planes, 64, bytes], else [KV, tokens, bytes]
  CUtensorMap value;       // the same; paged codes: [planes, D, 64]
  BlockPlanes key_planes;  // paged
  BlockPlanes value_planes;
  AttentionParams p;
  int min_query_tokens;
};

}  // namespace fastattn::cuda::wgmma_fp16
