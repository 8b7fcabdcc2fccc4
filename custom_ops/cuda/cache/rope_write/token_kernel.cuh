// Decode and speculative steps: a CTA handles 128 / (D / 8) heads of one token, a head in the lanes
// that own 8 channels each. Nothing waits for anything but its own loads; the price is that a
// token's V codes are stored as single bytes, 64 bytes apart.
#pragma once

#include "cuda/cache/rope_write/cache_store.cuh"
#include "cuda/cache/shared/token_lookup.cuh"

namespace fastattn::cuda {

inline constexpr int kTokenThreads = 128;

// Heads that one lane group may take; their loads are in flight together.
inline constexpr int kTokenHeadsMax = 4;

// What a head index of [Q heads, K heads, V heads] means.
struct HeadRole {
  bool is_q, is_k, is_v;  // none of them: past the last head
  int index;              // among its kind
};

template <typename Traits>
__device__ __forceinline__ HeadRole RoleOf(const StepParams& p, int head) {
  const int q_heads = Traits::kRope ? p.rope.num_heads : 0;
  const int kv_heads = p.rope.cache.num_kv_heads;
  HeadRole role;
  role.is_q = head < q_heads;
  role.is_k = !role.is_q && head < q_heads + kv_heads;
  role.is_v = !role.is_q && !role.is_k && head < q_heads + 2 * kv_heads;
  role.index = role.is_q ? head : role.is_k ? head - q_heads : head - q_heads - kv_heads;
  return role;
}

// Bias, rotation and norm. Lanes of a warp may hold heads of different kinds, and the shuffles
// inside need all of them: every step runs on a copy, and what applies is kept.
template <typename Traits>
__device__ __forceinline__ void TransformAny(const StepParams& p, const HeadRole& role,
                                             const Angles& angles, int head, int channel,
                                             bool owned, float (&x)[kChunk]) {
  const RopeWriteCacheParams& rope = p.rope;
  if (!owned) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = 0.0f;
  } else if (rope.bias != nullptr && (role.is_q || role.is_k || role.is_v)) {
    AddBias(rope.bias, rope.bias_dtype, static_cast<int64_t>(head) * Traits::kHeadDim + channel, x);
  }
  float y[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) y[i] = x[i];
  const void* weight = role.is_q ? rope.q_norm_weight : rope.k_norm_weight;
  const DType weight_dtype = role.is_q ? rope.q_norm_dtype : rope.k_norm_dtype;
  const bool any_weight = rope.q_norm_weight != nullptr || rope.k_norm_weight != nullptr;
  if (any_weight && rope.norm_before_rope) {
    RmsNorm<Traits::kHeadDim>(weight, weight_dtype, channel, rope.rms_norm_eps, y);
  }
  Rotate(rope, channel, angles, y);
  if (any_weight && !rope.norm_before_rope) {
    RmsNorm<Traits::kHeadDim>(weight, weight_dtype, channel, rope.rms_norm_eps, y);
  }
  if (owned && !role.is_v) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = y[i];
  }
}

// K or V of one token into the cache. All lanes of the warp take part.
template <typename Traits>
__device__ __forceinline__ void StoreKv(const PagedCache& cache, const HeadRole& role, int block,
                                        int slot, int channel, float (&x)[kChunk]) {
  const CacheStrides& strides = role.is_k ? cache.key_strides : cache.value_strides;
  const int64_t plane = strides.Plane(block, role.index);
  const bool store = block >= 0 && (role.is_k || role.is_v);
  RoundToInput<Traits::kIn>(x);
  if constexpr (Traits::kQuantized) {
    Inverses inverse;
    void* scales = role.is_k ? cache.k_scales : cache.v_scales;
    if (store) {
      LoadInverses<Traits>(cache, scales, role.is_k ? cache.k_granularity : cache.v_granularity,
                           role.index, channel, inverse);
    }
    const CacheStrides& scale_strides = role.is_k ? cache.k_scale_strides : cache.v_scale_strides;
    const uint2 codes =
        Quantize<Traits>(x, inverse, scales, cache.scale_dtype,
                         scale_strides.Plane(block, role.index) + slot, channel, store);
    if (store && role.is_k) {
      uint8_t* out = static_cast<uint8_t*>(cache.key) + plane + slot * strides.row + channel;
      *reinterpret_cast<uint2*>(out) = codes;
    } else if (store) {
      uint8_t* out =
          static_cast<uint8_t*>(cache.value) + plane + channel * strides.row + TokenSlot(slot);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        out[i * strides.row] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
      }
    }
  } else {
    const uint4 bits = RoundTo<Traits::kCode>(x);
    if (store) {
      uint16_t* out = static_cast<uint16_t*>(role.is_k ? cache.key : cache.value) + plane +
                      slot * strides.row + channel;
      *reinterpret_cast<uint4*>(out) = bits;
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kTokenThreads)
    StepTokenKernel(const __grid_constant__ StepParams p, int heads_per_group) {
  constexpr int kLanes = Traits::kLanes;
  const RopeWriteCacheParams& rope = p.rope;
  const PagedCache& cache = rope.cache;
  const int64_t token = blockIdx.y;
  const int first_head = blockIdx.x * (kTokenThreads / kLanes) + threadIdx.x / kLanes;
  const int head_step = gridDim.x * (kTokenThreads / kLanes);
  const int channel = threadIdx.x % kLanes * kChunk;

  // The values do not depend on where they go: load them first.
  Raw<Traits::kIn> raw[kTokenHeadsMax];
#pragma unroll
  for (int i = 0; i < kTokenHeadsMax; ++i) {
    if (i >= heads_per_group) break;
    const HeadRole role = RoleOf<Traits>(p, first_head + i * head_step);
    const void* source = role.is_q ? p.q : role.is_k ? p.k : p.v;
    const int64_t stride = role.is_q ? p.q_stride : role.is_k ? p.k_stride : p.v_stride;
    raw[i] = LoadRaw<Traits::kIn>(
        source, token * stride + static_cast<int64_t>(role.index) * Traits::kHeadDim + channel,
        role.is_q || role.is_k || role.is_v);
  }

  const TokenPlace place = FindToken(rope.seqs, token, token);
  const bool owned = place.batch_idx >= 0;
  Angles angles;
  int block = -1;
  if (owned) {
    block = FindBlock(rope.seqs, cache.num_blocks, place.batch_idx, place.position / kBlockSize);
    if constexpr (Traits::kRope) LoadAngles(rope, place.position, channel, angles);
  }
  const int slot = static_cast<int>(place.position % kBlockSize);
  const float q_inverse =
      rope.q_quant == QQuant::kPerTensor ? Div(1.0f, __ldg(rope.q_scale)) : 0.0f;
#pragma unroll
  for (int i = 0; i < kTokenHeadsMax; ++i) {
    if (i >= heads_per_group) break;
    const int head = first_head + i * head_step;
    const HeadRole role = RoleOf<Traits>(p, head);
    float x[kChunk];
    Unpack<Traits::kIn>(raw[i], x);
    if constexpr (Traits::kRope) {
      TransformAny<Traits>(p, role, angles, head, channel, owned, x);
      StoreQ<Traits>(rope, x, q_inverse, token, role.is_q ? head : 0, channel, role.is_q);
    }
    StoreKv<Traits>(cache, role, owned ? block : -1, slot, channel, x);
  }
}

}  // namespace fastattn::cuda
