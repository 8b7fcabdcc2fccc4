// rope_write_cache_kv: one launch reads the fused qkv once and writes Q and the new tokens' K and
// V.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "params/common.h"

namespace fastattn {

enum class RotaryStyle : int {
  kNone,         // no rotation
  kInterleaved,  // pairs (2i, 2i + 1)
  kNeox,         // pairs (i, i + rotary_dim / 2)
};

enum class QQuant : int {
  kNone,          // q keeps the type of qkv
  kPerTensor,     // e4m3, one given scale
  kPerTokenHead,  // e4m3, one measured scale a token and head
};

// Steps of a Q or K head: bias, rotation and RMSNorm (in the order asked for), rounding to the type
// of qkv, quantisation. V takes the bias only. Everything before the rounding is fp32.
//
// A token that belongs to no sequence, or has batch id -1, is not written into the cache and gets
// q = 0 (and the scale of an all-zero head).
struct RopeWriteCacheParams {
  const void* qkv = nullptr;            // [T, (H + 2 KV) * D], Q heads, then K, then V
  const void* bias = nullptr;           // [(H + 2 KV) * D] or null
  const void* q_norm_weight = nullptr;  // [D] or null
  const void* k_norm_weight = nullptr;  // [D] or null
  const float* cos = nullptr;           // [last_position + 1, rotary_stride], see RotaryRow
  const float* sin = nullptr;           // the same
  const float* q_scale = nullptr;       // [1], kPerTensor
  void* q = nullptr;                    // [T, H, D]: type of qkv, or e4m3
  float* q_descale = nullptr;           // [T, H], kPerTokenHead
  PagedCache cache;
  SeqMeta seqs;
  DType dtype = DType::kBFloat16;        // of qkv: bf16 or fp16
  DType bias_dtype = DType::kBFloat16;   // fp32, bf16 or fp16
  DType q_norm_dtype = DType::kFloat32;  // fp32, bf16 or fp16
  DType k_norm_dtype = DType::kFloat32;  // fp32, bf16 or fp16
  RotaryStyle style = RotaryStyle::kNone;
  QQuant q_quant = QQuant::kNone;
  bool norm_before_rope = false;
  int num_heads = 0;
  int rotary_dim = 0;             // channels from the start of a head that are rotated, even
  int rotary_step = 1;            // the angle of pair i is in column i * rotary_step of a row
  uint32_t rotary_stride = 0;     // elements from one position to the next
  int64_t rotary_seq_stride = 0;  // from one sequence's table to the next; 0: all share one
  uint32_t last_position = 0;     // of a table
  int64_t qkv_stride = 0;         // elements from one token to the next
  float rms_norm_eps = 1e-6f;
  int* arrivals = nullptr;  // decode kernel: ints that become 0, for the step's attention; or null
  int num_arrivals = 0;     // a multiple of 4
};

// First element in cos and in sin of the angles of a sequence's position; positions past the end of
// its table have the last one's. In 32 bits as far as they go: a GPU multiplies no wider.
FASTATTN_HD int64_t RotaryRow(const RopeWriteCacheParams& p, int batch_idx, uint32_t position) {
  const uint32_t row = position < p.last_position ? position : p.last_position;
  return static_cast<uint32_t>(batch_idx) * p.rotary_seq_stride +
         static_cast<int64_t>(uint64_t{row} * p.rotary_stride);
}

inline const char* NameOf(QQuant quant) {
  switch (quant) {
    case QQuant::kNone:
      return "none";
    case QQuant::kPerTensor:
      return "per_tensor";
    case QQuant::kPerTokenHead:
      return "per_token_head";
  }
  return "unknown";
}

}  // namespace fastattn
