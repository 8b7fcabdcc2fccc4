// Caches of multi-head latent attention (MLA): one latent and one rotated part a token, shared by
// all heads, and the operators that write and read them.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/index_array.h"

namespace fastattn {

enum class MlaFormat : int {
  kBf16,     // 512 latent and 64 rotated channels in bf16
  kFp8,      // the same in e4m3, one static scale for all
  kFp8x656,  // DeepSeek-V3.2: 512 e4m3, 4 fp32 scales, 64 bf16
  kFp8x584,  // DeepSeek-V4: 448 e4m3 and 64 bf16; apart from them 7 UE8M0 scales and a 0
  kFp8x528,  // DeepSeek-V4.1: 512 e4m3; apart from them 16 UE8M0 scales. Read only
};

// How dynamic scales follow from the largest magnitude of a tile.
enum class MlaScaleRule : int {
  kPow2,  // smallest power of two >= max(amax, 1e-4) / 448
  kAmax,  // max(amax / 448, FLT_MIN)
};

inline const char* NameOf(MlaFormat format) {
  switch (format) {
    case MlaFormat::kBf16:
      return "bf16";
    case MlaFormat::kFp8:
      return "fp8";
    case MlaFormat::kFp8x656:
      return "fp8_656";
    case MlaFormat::kFp8x584:
      return "fp8_584";
    case MlaFormat::kFp8x528:
      return "fp8_528";
  }
  return "unknown";
}

inline constexpr int kMlaRopeDim = 64;

// Sizes of a format. Rows hold codes, then (kFp8x656) scales, then bf16 channels.
struct MlaFormatFacts {
  int latent;       // channels that are not rotated
  int row_bytes;    // of a token, scales in a plane of their own left out
  int token_bytes;  // of a token
  int tile;         // channels that share a dynamic scale; 0: none
  int tiles;        // the others are bf16
};

FASTATTN_HD constexpr MlaFormatFacts FactsOf(MlaFormat format) {
  return format == MlaFormat::kBf16      ? MlaFormatFacts{512, 1152, 1152, 0, 0}
         : format == MlaFormat::kFp8     ? MlaFormatFacts{512, 576, 576, 0, 0}
         : format == MlaFormat::kFp8x656 ? MlaFormatFacts{512, 656, 656, 128, 4}
         : format == MlaFormat::kFp8x584 ? MlaFormatFacts{448, 576, 584, 64, 7}
                                         : MlaFormatFacts{448, 512, 528, 32, 16};
}

// Bytes of a token's scales where they have a plane of their own, behind the page's rows; else 0.
FASTATTN_HD constexpr int ScalePlaneBytes(MlaFormat format) {
  return FactsOf(format).token_bytes - FactsOf(format).row_bytes;
}

// Token slot s is row s % page_size of page s / page_size.
struct MlaCache {
  void* data = nullptr;     // bytes of the first page
  int64_t page_stride = 0;  // bytes
  int64_t row_stride = 0;   // bytes
  int64_t num_pages = 0;
  int page_size = 1;  // tokens; num_pages * page_size < 2^31
  MlaFormat format = MlaFormat::kBf16;

  // The scales of row 0 from the page's start, where they have a plane.
  FASTATTN_HD int64_t ScalePlane() const { return int64_t{page_size} * row_stride; }
};

// A token's bytes.
struct MlaRow {
  uint8_t* codes;
  uint8_t* scales;  // in the page's other plane, if it has one; else behind the codes
};

// `format` is the cache's, given apart because it is mostly a constant.
FASTATTN_HD MlaRow MlaRowOf(const MlaCache& cache, MlaFormat format, int64_t page, int64_t row) {
  uint8_t* base = static_cast<uint8_t*>(cache.data) + page * cache.page_stride;
  uint8_t* codes = base + row * cache.row_stride;
  if (ScalePlaneBytes(format) > 0) {
    return {codes, base + cache.ScalePlane() + row * ScalePlaneBytes(format)};
  }
  return {codes, codes + FactsOf(format).latent};
}

// mla_write_cache: one token for each slot. A slot outside the cache is skipped.
//
// Only in invalid input do two tokens share a slot; then either may be the one that stays.
struct MlaWriteParams {
  MlaCache cache;
  const uint16_t* latent = nullptr;  // [>= num_slots, latent] bf16
  const uint16_t* rope = nullptr;    // [>= num_slots, 64] bf16
  const float* scale = nullptr;      // [1], kFp8
  IndexArray slots;                  // [num_slots]
  int64_t num_slots = 0;
  int64_t latent_stride = 0;  // elements
  int64_t rope_stride = 0;    // elements
  MlaScaleRule scale_rule = MlaScaleRule::kPow2;
};

// mla_gather_cache: token i of sequence b goes to output token cu_seqlens_k[b] + i, each channel as
// round(code * scale) with one fp32 product; channels that the cache has in bf16 are copied.
//
// Which tokens a sequence gives is the same as for AppendCacheParams. cu_seqlens_k ascends; where
// it does not, sequences may be left out.
struct MlaGatherParams {
  MlaCache cache;
  uint16_t* out = nullptr;                // [num_out_tokens, latent + 64] bf16
  const float* scale = nullptr;           // [1], kFp8
  const int* block_tables = nullptr;      // [batch, max_blocks] pages
  const int* seq_lens_decoder = nullptr;  // [batch] cached tokens
  const int* cu_seqlens_k = nullptr;      // [batch + 1]
  int batch = 0;
  int max_blocks = 0;
  int64_t num_out_tokens = 0;
  int64_t out_stride = 0;  // elements
};

}  // namespace fastattn
