// Decode and speculative steps: a CTA handles 128 / (D / 8) heads of one token, a head in the lanes
// that own 8 channels each. Nothing waits for anything but its own loads; the price is that a
// token's V codes are stored as single bytes, 64 bytes apart.
#pragma once

#include "cuda/rope_write/cache_store.cuh"
#include "cuda/rope_write/token_place.cuh"

namespace fastattn::cuda {

inline constexpr int kTokenThreads = 128;

template <typename Traits>
__global__ void __launch_bounds__(kTokenThreads)
    StepTokenKernel(const __grid_constant__ StepParams p) {
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kLanes = Traits::kLanes;
  const RopeWriteCacheParams& rope = p.rope;
  const RowMeta& rows = rope.rows;
  const PagedCache& cache = rope.cache;
  const int kv_heads = cache.num_kv_heads;
  const int num_heads = rope.num_heads + 2 * kv_heads;
  const int64_t token = blockIdx.y;
  const int head = blockIdx.x * (kTokenThreads / kLanes) + threadIdx.x / kLanes;
  const int channel = threadIdx.x % kLanes * kChunk;
  const bool is_q = head < rope.num_heads;
  const bool is_k = !is_q && head < rope.num_heads + kv_heads;
  const bool is_v = !is_q && !is_k && head < num_heads;
  const int kv_head = is_k ? head - rope.num_heads : head - rope.num_heads - kv_heads;

  // The values do not depend on where they go: load them first.
  const void* source = is_q ? p.q : is_k ? p.k : p.v;
  const int64_t stride = is_q ? p.q_stride : is_k ? p.k_stride : p.v_stride;
  const int64_t element =
      token * stride + static_cast<int64_t>(is_q ? head : kv_head) * kHeadDim + channel;
  const auto raw = LoadRaw<Traits::kIn>(source, element, head < num_heads);

  const TokenPlace place = FindToken(rows, token, token);
  const bool owned = place.row >= 0;
  int block = -1;
  Angles angles;
  if (owned) {
    if (!is_q) {
      block = FindBlock(rows, cache.num_blocks, place.row, place.position / kBlockSize);
    }
    if (!is_v) LoadAngles(rope, place.position, channel, angles);
  }
  const int slot = static_cast<int>(place.position % kBlockSize);
  const int64_t block_head = static_cast<int64_t>(block) * kv_heads + kv_head;
  const bool store_kv = owned && block >= 0;

  float x[kChunk];
  Unpack<Traits::kIn>(raw, x);
  if (!owned) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = 0.0f;
  } else if (rope.bias != nullptr && head < num_heads) {
    AddBias(rope.bias, rope.bias_dtype, static_cast<int64_t>(head) * kHeadDim + channel, x);
  }
  // Lanes of a warp may hold heads of different kinds, and the shuffles inside need all of them:
  // run every step on a copy and keep what applies.
  float y[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) y[i] = x[i];
  const void* weight = is_q ? rope.q_norm_weight : rope.k_norm_weight;
  const DType weight_dtype = is_q ? rope.q_norm_dtype : rope.k_norm_dtype;
  const bool any_weight = rope.q_norm_weight != nullptr || rope.k_norm_weight != nullptr;
  if (any_weight && rope.norm_before_rope) {
    RmsNorm<kHeadDim>(weight, weight_dtype, channel, rope.rms_norm_eps, y);
  }
  Rotate(rope, channel, angles, y);
  if (any_weight && !rope.norm_before_rope) {
    RmsNorm<kHeadDim>(weight, weight_dtype, channel, rope.rms_norm_eps, y);
  }
  if (owned && !is_v) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = y[i];
  }

  const float q_inverse =
      rope.q_quant == QQuant::kPerTensor ? Div(1.0f, __ldg(rope.q_scale)) : 0.0f;
  if (rope.num_heads > 0) {
    StoreQ<Traits>(rope, x, q_inverse, token, is_q ? head : 0, channel, is_q);
  }
  RoundToInput<Traits::kIn>(x);
  const int64_t scale_index = block_head * kBlockSize + slot;
  if constexpr (Traits::kQuantized) {
    Inverses inverse;
    void* scales = is_k ? cache.k_scales : cache.v_scales;
    if (store_kv) {
      LoadInverses<Traits>(cache, scales, is_k ? cache.k_granularity : cache.v_granularity, kv_head,
                           channel, inverse);
    }
    const bool store = store_kv && (is_k || is_v);
    const uint2 codes =
        Quantize<Traits>(x, inverse, scales, cache.scale_dtype, scale_index, channel, store);
    if (store && is_k) {
      uint8_t* out = static_cast<uint8_t*>(cache.key) + scale_index * kHeadDim + channel;
      *reinterpret_cast<uint2*>(out) = codes;
    } else if (store) {
      uint8_t* out = static_cast<uint8_t*>(cache.value) +
                     (block_head * kHeadDim + channel) * kBlockSize + TokenSlot(slot);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        out[i * kBlockSize] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
      }
    }
  } else {
    const uint4 bits = RoundTo<Traits::kCode>(x);
    if (store_kv && (is_k || is_v)) {
      uint16_t* out =
          static_cast<uint16_t*>(is_k ? cache.key : cache.value) + scale_index * kHeadDim + channel;
      *reinterpret_cast<uint4*>(out) = bits;
    }
  }
}

}  // namespace fastattn::cuda
