// inverse_rope_quantize_fp8: the output of DeepSeek-V4's attention, rotated back and quantised for
// the grouped product that follows.
#pragma once

#include <cstdint>

#include "params/rotation.h"

namespace fastattn {

inline constexpr int kMlaOutputDim = 512;
inline constexpr int kMlaOutputBlock = 128;  // channels that share a scale
inline constexpr int kMlaOutputBlocks = kMlaOutputDim / kMlaOutputBlock;  // of a head
inline constexpr int kMlaScaleTokens = 4;  // rows of scales hold a multiple of as many tokens

struct InverseRopeParams {
  const uint16_t* x = nullptr;  // [T, H, 512] bf16
  Rotations rotations;
  uint8_t* codes = nullptr;  // [G, T, H / G * 512] e4m3
  float* scales = nullptr;   // [H * 4, padded_tokens], token fastest; 0 behind the last token
  int64_t num_tokens = 0;
  int64_t padded_tokens = 0;  // num_tokens, rounded up to kMlaScaleTokens
  int64_t token_stride = 0;   // elements
  int64_t head_stride = 0;    // elements
  int num_heads = 0;
  int group_heads = 1;  // heads of a group; divides num_heads

  // First code of a token's head.
  FASTATTN_HD int64_t CodesOf(int64_t token, int head) const {
    const int group = head / group_heads;
    return ((group * num_tokens + token) * group_heads + (head - group * group_heads)) *
           kMlaOutputDim;
  }
};

}  // namespace fastattn
