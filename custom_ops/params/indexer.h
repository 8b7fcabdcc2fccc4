// DeepSeek-V4 indexer: quantised queries, and the compressed keys of a paged page format.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/index_array.h"

namespace fastattn {

// The last kIndexerRopeDim channels of a head are rotated; the rest is not.
inline constexpr int kIndexerRopeDim = 64;
inline constexpr int kIndexerHeadDim = 128;
inline constexpr int kIndexerWideHeadDim = 512;
inline constexpr int kWideFp8Block = 64;

enum class IndexerQuant : int {
  kFp8,      // head 128: e4m3, one power-of-two fp32 scale a token
  kMxfp4,    // head 128: E2M1 pairs, one UE8M0 byte per 32 channels
  kFp8Wide,  // head 512: 448 e4m3 with a UE8M0 byte per 64 channels, 64 bf16
};

inline const char* NameOf(IndexerQuant quant) {
  switch (quant) {
    case IndexerQuant::kFp8:
      return "fp8";
    case IndexerQuant::kMxfp4:
      return "mxfp4";
    case IndexerQuant::kFp8Wide:
      return "fp8_512";
  }
  return "unknown";
}

// A page of n tokens holds n * code_bytes of codes, then n * scale_bytes of scales.
struct IndexerPageFormat {
  int head_dim;
  int code_bytes;   // a token
  int scale_bytes;  // a token
};

FASTATTN_HD constexpr IndexerPageFormat PageFormatOf(IndexerQuant quant) {
  return quant == IndexerQuant::kFp8     ? IndexerPageFormat{kIndexerHeadDim, 128, 4}
         : quant == IndexerQuant::kMxfp4 ? IndexerPageFormat{kIndexerHeadDim, 64, 4}
                                         : IndexerPageFormat{kIndexerWideHeadDim, 576, 8};
}

struct IndexerQParams {
  IndexArray positions;                   // [T]; clamped to [0, max_positions)
  const uint16_t* q = nullptr;            // [T, H, 128] bf16
  const void* cos_sin = nullptr;          // [max_positions, 64]: 32 cosines, then 32 sines
  const void* weights = nullptr;          // [T, H]
  uint8_t* codes = nullptr;               // kFp8 [T, H, 128], kMxfp4 [T, H, 64]
  void* scales = nullptr;                 // kFp8 float [T, H], kMxfp4 uint8 [T, H, 4]
  float* weights_out = nullptr;           // [T, H]
  DType cos_sin_dtype = DType::kFloat32;  // fp32 or bf16
  DType weights_dtype = DType::kFloat32;  // fp32 or bf16
  IndexerQuant quant = IndexerQuant::kFp8;
  int64_t num_tokens = 0;
  int num_heads = 0;
  int64_t max_positions = 0;   // at least 1
  int64_t q_token_stride = 0;  // elements
  int64_t q_head_stride = 0;   // elements
  float softmax_scale = 1.0f;
  float head_scale = 1.0f;
};

// Queries that are rotated already, quantised as the rows of a paged top-k.
struct IndexerQQuantParams {
  const uint16_t* q = nullptr;              // [T, H, 128] bf16
  const void* weights = nullptr;            // [T, H]
  const int32_t* token_of_query = nullptr;  // [num_queries]; outside [0, T): none; null: itself
  uint8_t* codes = nullptr;                 // [num_queries, H, 128] e4m3; 0 where there is none
  float* weights_out = nullptr;             // [num_queries, H]; 0 where there is none
  DType weights_dtype = DType::kFloat32;    // fp32, bf16 or fp16
  int64_t num_tokens = 0;
  int64_t num_queries = 0;
  int64_t q_token_stride = 0;  // elements
  int64_t q_head_stride = 0;   // elements
  int num_heads = 0;
  float factor = 1.0f;  // of the weights

  // The token of a query; -1: none.
  FASTATTN_HD int64_t TokenOf(int64_t query) const {
    const int64_t token = token_of_query == nullptr ? query : token_of_query[query];
    return token >= 0 && token < num_tokens ? token : -1;
  }
};

// A token is processed if its state slot and KV slot exist and its position completes a group.
// Nothing read from the device is trusted: see the checks in the kernel.
struct IndexerKvParams {
  const void* state = nullptr;               // [num_state_blocks, state_block, 2 * SW]
  const int* block_tables = nullptr;         // [batch, max_blocks] state blocks
  const int* batch_ids = nullptr;            // [T] sequence of a token; outside [0, batch) = skip
  IndexArray positions;                      // [T]
  IndexArray state_slots;                    // [T] negative = skip
  IndexArray kv_slots;                       // [T] page * page_size + entry; others = skip
  const void* rms_weight = nullptr;          // [HEAD]
  const void* cos_sin = nullptr;             // [max_positions, 64]
  uint8_t* kv_cache = nullptr;               // [num_pages, page_stride] bytes
  DType state_dtype = DType::kFloat32;       // fp32 or bf16
  DType rms_weight_dtype = DType::kFloat32;  // fp32 or bf16
  DType cos_sin_dtype = DType::kFloat32;     // fp32 or bf16
  IndexerQuant quant = IndexerQuant::kFp8;
  int64_t num_tokens = 0;
  int64_t num_state_blocks = 0;
  int64_t state_block = 0;         // positions a state block
  int64_t state_block_stride = 0;  // elements; a position has 2 * SW
  int batch = 0;
  int max_blocks = 0;
  int64_t max_positions = 0;  // at least 1
  int64_t num_pages = 0;
  int64_t page_size = 0;    // tokens
  int64_t page_stride = 0;  // bytes; a multiple of 4
  int compress_ratio = 4;   // 4 (groups overlap: SW = 2 * HEAD) or 128 (SW = HEAD)
  float rms_norm_eps = 1e-6f;
};

}  // namespace fastattn
