// Index keys of a paged cache: quantised into its pages, and gathered from them.
#pragma once

#include <cstdint>

#include "common/numeric.h"
#include "common/types.h"
#include "params/indexer.h"

namespace fastattn {

// Scale of an FP8 key from its largest magnitude, and codes from that.
enum class IndexerScaleRule : int {
  kPow2,     // smallest power of two >= max(amax, 1e-4) / 448
  kAmax,     // max(amax, 1e-4) / 448; channels are multiplied by its reciprocal
  kAmaxDiv,  // the same; channels are divided by it, which rounds otherwise
};

inline constexpr float kIndexerAmaxFloor = 1e-4f;

// The scale of kAmax and kAmaxDiv. A NaN has one bit pattern, whatever the processor makes of its
// payload.
FASTATTN_HD float IndexerAmaxScale(uint32_t amax_bits) {
  if (amax_bits > 0x7F800000u) return BitsFloat(0x7FC00000u);
  return DynamicScale(amax_bits, kIndexerAmaxFloor, kE4M3Max);
}

// Pages of index keys: n rows of codes, then n rows of scales, then bytes that are never touched.
struct IndexerPages {
  IndexerQuant quant = IndexerQuant::kFp8;  // kFp8 or kMxfp4
  int64_t num_pages = 0;
  int64_t page_size = 0;    // tokens; at least 1
  int64_t page_stride = 0;  // bytes from one page to the next

  // Offset of a row's codes and scales from the first page, in bytes.
  FASTATTN_HD int64_t Codes(int64_t page, int64_t row) const {
    return page * page_stride + row * PageFormatOf(quant).code_bytes;
  }
  FASTATTN_HD int64_t Scales(int64_t page, int64_t row) const {
    const IndexerPageFormat format = PageFormatOf(quant);
    return page * page_stride + page_size * format.code_bytes + row * format.scale_bytes;
  }
};

struct IndexerKWriteParams {
  const void* key = nullptr;  // [>= T, 128]
  IndexArray slots;           // [T] page * page_size + row; others = skip
  uint8_t* cache = nullptr;   // see IndexerPages
  IndexerPages pages;
  DType key_dtype = DType::kBFloat16;  // fp32, bf16 or fp16
  IndexerScaleRule scale_rule = IndexerScaleRule::kPow2;
  int64_t num_tokens = 0;
  int64_t key_stride = 0;  // elements from one token to the next
};

// Row cu_seqlens[b] + j takes token j of sequence b. Rows of no sequence and tokens without a page
// are left as they are.
struct IndexerKGatherParams {
  const uint8_t* cache = nullptr;
  const int32_t* block_tables = nullptr;  // [batch, max_blocks] pages
  const int32_t* cu_seqlens = nullptr;    // [batch + 1]
  uint8_t* codes = nullptr;               // [num_rows, code_bytes]
  uint8_t* scales = nullptr;              // [num_rows, 4] bytes
  IndexerPages pages;
  int batch = 0;
  int max_blocks = 0;
  int64_t num_rows = 0;
};

}  // namespace fastattn
