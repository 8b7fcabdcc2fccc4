#include "cpu/mla_qkv.h"

#include <algorithm>

#include "common/mla_scale.h"
#include "cpu/inverse_rms.h"
#include "cpu/mla_cache.h"
#include "cpu/parallel.h"
#include "cpu/rotation.h"

namespace fastattn::cpu {

namespace {

constexpr int kPlain = kMlaQkvDim - kMlaRopeDim;

void QueryHead(const MlaQkvParams& p, const Rotation& rotation, int64_t token, int head) {
  uint16_t* out = p.q_out + token * p.out_token_stride + head * p.out_head_stride;
  if (head >= p.num_heads) {
    std::fill_n(out, kMlaQkvDim, uint16_t{0});
    return;
  }
  const uint16_t* q = p.q + token * p.q_token_stride + head * p.q_head_stride;
  float x[kMlaQkvDim];
  for (int d = 0; d < kMlaQkvDim; ++d) x[d] = BFloat16ToFloat(q[d]);
  const float inverse = InverseRms<kMlaQkvDim>(p.rms_norm_eps, x);
  for (float& value : x) value = Mul(value, inverse);
  Rotate(rotation, x + kPlain);
  for (int d = 0; d < kMlaQkvDim; ++d) out[d] = ComputedBFloat16(x[d]);
}

void KeyToken(const MlaQkvParams& p, const MlaWriteParams& write, const Rotation& rotation,
              int64_t token) {
  const uint16_t* kv = p.kv + token * p.kv_stride;
  float x[kMlaRopeDim];
  uint16_t rope[kMlaRopeDim];
  for (int d = 0; d < kMlaRopeDim; ++d) x[d] = BFloat16ToFloat(kv[kPlain + d]);
  Rotate(rotation, x);
  for (int d = 0; d < kMlaRopeDim; ++d) rope[d] = ComputedBFloat16(x[d]);
  MlaWriteToken(write, token, kv, rope);
}

}  // namespace

void MlaQkvNormRopeWrite(const MlaQkvParams& p) {
  MlaWriteParams write;
  write.cache = p.cache;
  write.slots = p.slots;
  const int64_t heads = p.out_heads + 1;  // the last one is the key
  ParallelFor(p.num_tokens * heads, 2LL * kMlaQkvDim, [&](int64_t begin, int64_t end) {
    Rotation rotation;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = i / heads;
      const int head = static_cast<int>(i % heads);
      if (i == begin || head == 0) {
        const Rotations& r = p.rotations;
        rotation =
            LoadRotation(r.cos_sin, r.dtype, r.RowOf(r.positions.At(token)), r.max_positions);
      }
      if (head < p.out_heads) {
        QueryHead(p, rotation, token, head);
      } else if (token < p.num_slots) {
        KeyToken(p, write, rotation, token);
      }
    }
  });
}

}  // namespace fastattn::cpu
