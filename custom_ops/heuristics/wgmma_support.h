// What the two WGMMA kernels of sm_90a take: shapes, types, strides and alignments that TMA and the
// kernels ask for. Pure functions of what the host knows; no pointer is read.
#pragma once

#include <cstdint>
#include <limits>

#include "common/head_dims.h"
#include "common/types.h"
#include "params/attention.h"
#include "params/block_planes.h"

namespace fastattn {

// Their own lists: another head dimension may come to decode first. Of contiguous codes.
using WgmmaHeadDims = HeadDimList<64, 128>;
// Of caches of codes of 8 and 4 bits.
using WgmmaCacheHeadDims = HeadDimList<64, 96, 128, 256>;
// Of e4m3 queries.
using WgmmaFp8HeadDims = HeadDimList<64, 96, 128, 192, 256>;
// Of 16-bit keys and values.
using Wgmma16BitHeadDims = HeadDimList<64, 96, 128, 192, 256>;

inline constexpr int kTmaBytes = 16;  // addresses and strides are multiples of it

inline bool IsTmaAligned(const void* pointer) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % kTmaBytes == 0;
}

// Whether TMA takes a stride of so many elements.
inline bool IsTmaStride(int64_t elements, DType dtype) {
  return elements > 0 && elements * SizeOf(dtype) % kTmaBytes == 0;
}

inline DType KeyType(const AttentionParams& p) { return p.paged ? p.cache.dtype : p.ragged.dtype; }

namespace wgmma_support {

inline bool PlanesFit(const PagedCache& cache) {
  const int size = SizeOf(cache.dtype);
  return PlanesOf(cache.key_strides, cache.num_blocks, cache.num_kv_heads, size).fits &&
         PlanesOf(cache.value_strides, cache.num_blocks, cache.num_kv_heads, size).fits;
}

// Whether rows of 64 scales of one block and head may be copied by TMA.
inline bool ScalesFit(const void* scales, const CacheStrides& strides, DType dtype) {
  return IsTmaAligned(scales) && strides.block * SizeOf(dtype) % kTmaBytes == 0 &&
         strides.head * SizeOf(dtype) % kTmaBytes == 0;
}

// What both kernels ask of a call. A running maximum of scaled scores needs a positive scale.
inline bool Common(const AttentionParams& p) {
  if (p.seqs.num_tokens <= 0 || p.seqs.batch <= 0 || p.num_heads <= 0) return false;
  if (p.num_kv_heads <= 0 || p.num_kv_heads > 65535 || p.num_heads % p.num_kv_heads != 0) {
    return false;
  }
  if (p.paged
          ? p.seqs.max_blocks <= 0
          : p.ragged.num_tokens <= 0 || p.ragged.num_tokens >= std::numeric_limits<int>::max()) {
    return false;
  }
  return IsTmaStride(p.q_token_stride, p.q_dtype) && IsTmaStride(p.q_head_stride, p.q_dtype) &&
         IsTmaAligned(p.q) && IsTmaAligned(p.out) && p.softmax_scale > 0.0f;
}

inline bool Fp8Cache(const PagedCache& cache) {
  const bool dynamic = IsDynamic(cache.type);
  if (HasGroupScales(cache.type) || HasTwoCodes(cache.type)) return false;
  if (cache.layout != CacheLayout::kFastattn) return false;
  if (cache.dtype != DType::kE4M3 && (cache.dtype != DType::kE5M2 || dynamic)) return false;
  if (cache.k_scales == nullptr || cache.v_scales == nullptr) return false;
  if (dynamic && !(ScalesFit(cache.k_scales, cache.k_scale_strides, cache.scale_dtype) &&
                   ScalesFit(cache.v_scales, cache.v_scale_strides, cache.scale_dtype))) {
    return false;
  }
  return IsTmaAligned(cache.key) && IsTmaAligned(cache.value) && PlanesFit(cache);
}

// Values are transposed first, four channels at a time.
inline bool Fp8Ragged(const RaggedKv& kv) {
  return (kv.dtype == DType::kE4M3 || kv.dtype == DType::kE5M2) &&
         IsTmaStride(kv.key_token_stride, kv.dtype) && IsTmaStride(kv.key_head_stride, kv.dtype) &&
         kv.value_token_stride % 4 == 0 && kv.value_head_stride % 4 == 0 && IsTmaAligned(kv.key) &&
         IsTmaAligned(kv.value);
}

inline bool Q16Cache(const PagedCache& cache, DType query) {
  if (!IsTmaAligned(cache.key) || !IsTmaAligned(cache.value) || !PlanesFit(cache)) return false;
  if (!IsQuantized(cache.type)) return cache.dtype == query;
  if (HasGroupScales(cache.type) || HasTwoCodes(cache.type)) return false;
  // e5m2 reaches too far for fp16 times a token's scale.
  if (IsDynamic(cache.type) && cache.dtype == DType::kE5M2) return false;
  return SizeOf(cache.dtype) == 1 && cache.dtype != DType::kUInt8 &&
         cache.layout == CacheLayout::kFastattn && cache.k_scales != nullptr &&
         cache.v_scales != nullptr;
}

inline bool Q16Ragged(const RaggedKv& kv, DType query) {
  if (kv.dtype != query && (SizeOf(kv.dtype) != 1 || kv.dtype == DType::kUInt8)) return false;
  for (int64_t stride :
       {kv.key_token_stride, kv.key_head_stride, kv.value_token_stride, kv.value_head_stride}) {
    if (!IsTmaStride(stride, kv.dtype)) return false;
  }
  return IsTmaAligned(kv.key) && IsTmaAligned(kv.value);
}

}  // namespace wgmma_support

// Blocks of V that wgmma_sm90/fp8 reads: the cache's, or those that ragged values are transposed
// into.
inline int64_t WgmmaFp8ValueBlocks(const AttentionParams& p) {
  return p.paged ? p.cache.num_blocks : p.ragged.num_tokens / kBlockSize + p.seqs.batch;
}

// Floats of p.workspace for the transposed values, aligned to 128 bytes.
inline int64_t WgmmaFp8Workspace(const AttentionParams& p) {
  if (p.paged) return 0;
  return WgmmaFp8ValueBlocks(p) * p.num_kv_heads * ValueDim(p.head_dim) * kBlockSize /
         static_cast<int64_t>(sizeof(float));
}

// e4m3 queries over FP8 keys and values.
inline bool WgmmaFp8Supports(const AttentionParams& p) {
  if (p.q_dtype != DType::kE4M3 || !WgmmaFp8HeadDims::Has(p.head_dim)) return false;
  if (!wgmma_support::Common(p)) return false;
  if (p.paged ? !wgmma_support::Fp8Cache(p.cache) : !wgmma_support::Fp8Ragged(p.ragged)) {
    return false;
  }
  return (WgmmaFp8ValueBlocks(p) + 1) * p.num_kv_heads < std::numeric_limits<int>::max();
}

// 16-bit queries over keys and values of 16 or 8 bits.
inline bool WgmmaQ16Supports(const AttentionParams& p) {
  if (p.q_dtype != DType::kBFloat16 && p.q_dtype != DType::kFloat16) return false;
  const bool fits = SizeOf(KeyType(p)) == 2 ? Wgmma16BitHeadDims::Has(p.head_dim)
                    : p.paged               ? WgmmaCacheHeadDims::Has(p.head_dim)
                                            : WgmmaHeadDims::Has(p.head_dim);
  if (!fits || !wgmma_support::Common(p)) return false;
  return p.paged ? wgmma_support::Q16Cache(p.cache, p.q_dtype)
                 : wgmma_support::Q16Ragged(p.ragged, p.q_dtype);
}

}  // namespace fastattn
