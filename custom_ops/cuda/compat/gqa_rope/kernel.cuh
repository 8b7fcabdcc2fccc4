// New tokens of gqa_rope_write_cache: a CTA handles 128 / (D / 8) heads of one token, a head in the
// lanes that own 8 channels each, as in the one-token kernel of rope_write_cache_kv.
#pragma once

#include "common/dispatch.h"
#include "cuda/cache/rope_write/token_kernel.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/compat/gqa_rope/launch.h"

namespace fastattn::cuda {

struct GqaParams {
  GqaRopeWriteCacheParams gqa;
  StepParams step;
};

// 8 K codes of one token in slot order for a lane of each two that share 16 channels, the lower 8
// of which are the even lane's. All lanes of the warp take part.
__device__ __forceinline__ uint2 KeyCodesInSlots(uint2 codes) {
  const bool upper = threadIdx.x % 2 != 0;
  const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, upper ? codes.x : codes.y, 1);
  const uint32_t low = upper ? other : codes.x, high = upper ? codes.y : other;
  return make_uint2(__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632));
}

// 8 codes of one token, in the bytes that FastDeploy's layout gives them; K's in slot order.
template <typename Traits>
__device__ __forceinline__ void StoreFastDeploy(uint8_t* block, bool is_value, int slot,
                                                int channel, uint2 codes) {
  constexpr CacheLayout kLayout = CacheLayout::kFastDeploy;
  constexpr uint32_t kFlip = Traits::kCode == DType::kInt8 ? 0x80808080u : 0u;  // int8 + 128
  codes = make_uint2(codes.x ^ kFlip, codes.y ^ kFlip);
  if (!is_value) {
    const int offset = KeyOffset<kLayout>(slot, channel & ~15, Traits::kHeadDim) + (channel & 8);
    *reinterpret_cast<uint2*>(block + offset) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const auto code = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)));
    block[ValueOffset<kLayout>(slot, channel + i, Traits::kHeadDim)] = code;
  }
}

// K or V of one token into the cache. All lanes of the warp take part; block -1: none is written.
template <typename Traits>
__device__ __forceinline__ void StoreGqaKv(const PagedCache& cache, const HeadRole& role, int block,
                                           int slot, int channel, float (&x)[kChunk]) {
  if constexpr (!Traits::kQuantized) {
    StoreKv<Traits>(cache, role, block, slot, channel, x);
  } else {
    const bool store = block >= 0 && (role.is_k || role.is_v);
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
    const uint2 key_codes = KeyCodesInSlots(codes);
    if (store) {
      auto* base = static_cast<uint8_t*>(role.is_k ? cache.key : cache.value);
      const CacheStrides& strides = role.is_k ? cache.key_strides : cache.value_strides;
      StoreFastDeploy<Traits>(base + strides.Plane(block, role.index), role.is_v, slot, channel,
                              role.is_v ? codes : key_codes);
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kTokenThreads)
    GqaTokenKernel(const __grid_constant__ GqaParams p) {
  constexpr int kLanes = Traits::kLanes, kHeadDim = Traits::kHeadDim;
  const RopeWriteCacheParams& rope = p.step.rope;
  const int64_t token = blockIdx.x;
  const int head = blockIdx.y * (kTokenThreads / kLanes) + threadIdx.x / kLanes;
  const int channel = threadIdx.x % kLanes * kChunk;
  const HeadRole role = RoleOf<Traits>(p.step, head);
  const bool active = role.is_q || role.is_k || role.is_v;
  const int64_t width = (rope.num_heads + 2LL * rope.cache.num_kv_heads) * kHeadDim;
  const int64_t fused = static_cast<int64_t>(head) * kHeadDim + channel;

  const Raw<Traits::kIn> raw =
      LoadRaw<Traits::kIn>(p.step.q, token * rope.qkv_stride + fused, active);
  const TokenPlace place = FindToken(rope.seqs, token, token);
  const bool owned = place.batch_idx >= 0;
  Angles angles;
  int block = -1;
  int64_t out = -1;
  if (owned) {
    LoadAngles(rope, place.position, channel, angles);
    const int encoder = __ldg(p.gqa.seq_lens_encoder + place.batch_idx);
    const int decoder = __ldg(rope.seqs.seq_lens_decoder + place.batch_idx);
    const int first = __ldg(p.gqa.cu_seqlens_k + place.batch_idx);
    if (encoder > 0) {
      block =
          FindBlock(rope.seqs, rope.cache.num_blocks, place.batch_idx, place.position / kBlockSize);
    }
    const int64_t i = place.position - max(decoder, 0);
    out = first < 0 ? -1 : first + static_cast<int64_t>(PrefixLength(encoder, decoder)) + i;
    if (out >= p.gqa.num_kv_tokens) out = -1;
  }
  float x[kChunk];
  Unpack<Traits::kIn>(raw, x);
  TransformAny<Traits>(p.step, role, angles, head, channel, owned, x);
  const uint4 bits = RoundTo<Traits::kIn>(x);
  if (active) {
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.gqa.qkv_out) + token * width + fused) = bits;
  }
  if (role.is_q) {
    const int64_t element = (token * rope.num_heads + head) * kHeadDim + channel;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(rope.q) + element) = bits;
  } else if (active && out >= 0) {
    const int64_t element = (out * rope.cache.num_kv_heads + role.index) * kHeadDim + channel;
    void* target = role.is_v ? p.gqa.value : p.gqa.key;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(target) + element) = bits;
  }
  const int slot = static_cast<int>(place.position % kBlockSize);
  StoreGqaKv<Traits>(rope.cache, role, block, slot, channel, x);
}

template <DType kIn, CacheType kType, DType kCode>
cudaError_t LaunchGqaFormat(const GqaParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<64, 128>(p.step.rope.cache.head_dim, "head_dim", [&](auto head_dim) {
    using Traits = StepTraits<kIn, kType, kCode, decltype(head_dim)::value, true>;
    constexpr int kGroups = kTokenThreads / Traits::kLanes;
    const int heads = p.step.rope.num_heads + 2 * p.step.rope.cache.num_kv_heads;
    const dim3 grid(p.step.rope.seqs.num_tokens, (heads + kGroups - 1) / kGroups);
    status = LaunchKernel(GqaTokenKernel<Traits>, grid, kTokenThreads, stream, p);
  });
  return status;
}

template <DType kIn>
cudaError_t LaunchGqaTokens(const GqaRopeWriteCacheParams& gqa, cudaStream_t stream) {
  GqaParams p;
  p.gqa = gqa;
  p.step.rope = gqa.rope;
  p.step.q = gqa.rope.qkv;
  cudaError_t status = cudaErrorInvalidValue;
  dispatch<CacheType::kNone, CacheType::kInt8, CacheType::kFp8, CacheType::kBlockWiseFp8>(
      gqa.rope.cache.type, "cache_quant_type", [&](auto type) {
        constexpr CacheType kType = decltype(type)::value;
        constexpr DType kCode = kType == CacheType::kNone ? kIn
                                : IsInt8(kType)           ? DType::kInt8
                                                          : DType::kE4M3;
        status = LaunchGqaFormat<kIn, kType, kCode>(p, stream);
      });
  return status;
}

}  // namespace fastattn::cuda
