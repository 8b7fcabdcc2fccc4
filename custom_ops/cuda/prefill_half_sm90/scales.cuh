// Token scales (block_wise_fp8, block_wise_int8): read by the loading warp, one step after the
// other.
#pragma once

#include "common/numeric.h"
#include "cuda/prefill_half_sm90/blocks.cuh"
#include "cuda/prefill_half_sm90/config.h"

namespace fastattn::cuda::prefill_half_sm90 {

template <class C>
class ScaleLoader {
 public:
  __device__ ScaleLoader(const AttentionParams& p, Shared<C>& shared)
      : p_(p), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ void StartTile() { reference_ = 0.0f; }

  // Starts the loads; tokens that do not exist get 1 for K, and 0 for V.
  __device__ void Load(const StepBlocks& blocks, int kv_head, int written) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int token = lane_ + 32 * i, block = blocks.id[token / kBlockSize];
      key_[i] = 1.0f;
      value_[i] = 0.0f;
      if (token >= written || block < 0) continue;
      const int64_t at = (static_cast<int64_t>(block) * p_.num_kv_heads + kv_head) * kBlockSize +
                         token % kBlockSize;
      key_[i] = LoadScale(p_.cache.k_scales, p_.cache.scale_dtype, at);
      value_[i] = LoadScale(p_.cache.v_scales, p_.cache.scale_dtype, at);
    }
    hide_ = blocks.flags & kClean;
  }

  // Writes them. In a step that some query sees in part, scales of V that are not finite become 0
  // and are listed for the consumers: P is 0 where a query does not see them, but 0 * NaN is NaN.
  __device__ void Store() {
    const int at = slots_.index;
    float largest = 0.0f;
    bool found = false;
    unsigned poisoned[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const bool finite = fabsf(value_[i]) <= 3.0e38f;
      poisoned[i] = __ballot_sync(~0u, hide_ && !finite);
      found |= poisoned[i] != 0;
      if (hide_ && !finite) value_[i] = 0.0f;
      if (finite) largest = fmaxf(largest, fabsf(value_[i]));
    }
    const unsigned bits = __reduce_max_sync(~0u, __float_as_uint(largest));
    // The unit is a power of two above all scales so far, so that it seldom changes.
    const unsigned exponent = min(max((bits >> 23) + 1, 68u), 250u);
    const float unit = fmaxf(__uint_as_float(exponent << 23), reference_);
    const float inverse = __uint_as_float((254u << 23) - __float_as_uint(unit));
    Wait(&shared_.scale_empty[at], slots_.phase ^ 1);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int token = lane_ + 32 * i;
      shared_.scales[at][0][token] = key_[i];
      shared_.scales[at][1][token] = value_[i] * inverse;
      if (lane_ == i) shared_.poisoned[at][i] = poisoned[i];
    }
    if (lane_ == 0) {
      shared_.reference[at] = make_float2(unit, reference_ * inverse);
      shared_.poison_found[at] = found;
    }
    reference_ = unit;
    __syncwarp();
    if (lane_ == 0) Arrive(&shared_.scale_full[at]);
    slots_.Advance();
  }

 private:
  static constexpr int kPer = C::kKeys / 32;
  const AttentionParams& p_;
  Shared<C>& shared_;
  const int lane_;
  Ring<C::kScaleSlots> slots_;
  float key_[kPer], value_[kPer];
  bool hide_;
  float reference_ = 0.0f;
};

}  // namespace fastattn::cuda::prefill_half_sm90
