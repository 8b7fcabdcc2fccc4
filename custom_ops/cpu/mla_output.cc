#include "cpu/mla_output.h"

#include <algorithm>

#include "cpu/indexer_encode.h"
#include "cpu/parallel.h"
#include "cpu/rotation.h"

namespace fastattn::cpu {

namespace {

void QuantizeHead(const InverseRopeParams& p, int64_t token, int head) {
  const uint16_t* in = p.x + token * p.token_stride + head * p.head_stride;
  float x[kMlaOutputDim];
  for (int d = 0; d < kMlaOutputDim; ++d) x[d] = BFloat16ToFloat(in[d]);
  const Rotations& r = p.rotations;
  Rotation rotation =
      LoadRotation(r.cos_sin, r.dtype, r.RowOf(r.positions.At(token)), r.max_positions);
  for (float& sin : rotation.sin) sin = -sin;  // exact, so that this is the rotation back
  Rotate(rotation, x + kMlaOutputDim - kRotatedDim);
  uint8_t* codes = p.codes + p.CodesOf(token, head);
  float* scales = p.scales + int64_t{head} * kMlaOutputBlocks * p.padded_tokens + token;
  for (int b = 0; b < kMlaOutputBlocks; ++b) {
    const int at = b * kMlaOutputBlock;
    scales[b * p.padded_tokens] =
        EncodeFp8(x + at, kMlaOutputBlock, codes + at, kActivationFloorBits);
  }
}

}  // namespace

void InverseRopeQuantizeFp8(const InverseRopeParams& p) {
  const int64_t rows = int64_t{p.num_heads} * kMlaOutputBlocks;
  for (int64_t row = 0; row < rows; ++row) {
    float* scales = p.scales + row * p.padded_tokens;
    std::fill(scales + p.num_tokens, scales + p.padded_tokens, 0.0f);
  }
  ParallelFor(p.num_tokens * p.num_heads, 2LL * kMlaOutputDim, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      QuantizeHead(p, i / p.num_heads, static_cast<int>(i % p.num_heads));
    }
  });
}

}  // namespace fastattn::cpu
