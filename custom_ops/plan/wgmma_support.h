// What the two WGMMA kernels of sm_90a take: shapes, types, strides and alignments that TMA and the
// kernels ask for. Pure functions of what the host knows; no pointer is read. Each tells why it
// does not take a call.
#pragma once

#include <cstdint>
#include <limits>

#include "common/head_dims.h"
#include "common/types.h"
#include "params/attention.h"
#include "params/block_planes.h"
#include "plan/kernel_row.h"

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
inline Reason Common(const AttentionParams& p) {
  if (p.seqs.num_tokens <= 0 || p.seqs.batch <= 0 || p.num_heads <= 0) return "the call is empty";
  if (p.num_kv_heads <= 0 || p.num_kv_heads > 65535 || p.num_heads % p.num_kv_heads != 0) {
    return "it has too many KV heads";
  }
  if (p.paged
          ? p.seqs.max_blocks <= 0
          : p.ragged.num_tokens <= 0 || p.ragged.num_tokens >= std::numeric_limits<int>::max()) {
    return "there are no keys, or too many";
  }
  if (!IsTmaStride(p.q_token_stride, p.q_dtype) || !IsTmaStride(p.q_head_stride, p.q_dtype) ||
      !IsTmaAligned(p.q) || !IsTmaAligned(p.out)) {
    return "TMA cannot read the queries: their address and strides are no multiples of 16 bytes";
  }
  return p.softmax_scale > 0.0f ? nullptr : "softmax_scale is not positive";
}

inline constexpr Reason kUnreadable =
    "TMA cannot read the keys: addresses and strides are no multiples of 16 bytes, or too large";

inline Reason Fp8Cache(const PagedCache& cache) {
  const bool dynamic = IsDynamic(cache.type);
  if (HasGroupScales(cache.type)) return "scales of groups have no kernel there";
  if (HasTwoCodes(cache.type)) return "keys and values have different codes";
  if (cache.layout != CacheLayout::kFastattn) return "the cache has another layout";
  if (cache.dtype != DType::kE4M3 && (cache.dtype != DType::kE5M2 || dynamic)) {
    return "the keys are not FP8, or e5m2 with scales of tokens";
  }
  if (cache.k_scales == nullptr || cache.v_scales == nullptr) return "the cache has no scales";
  if (dynamic && !(ScalesFit(cache.k_scales, cache.k_scale_strides, cache.scale_dtype) &&
                   ScalesFit(cache.v_scales, cache.v_scale_strides, cache.scale_dtype))) {
    return "TMA cannot read the scales of tokens: their rows are no multiples of 16 bytes";
  }
  const bool reads = IsTmaAligned(cache.key) && IsTmaAligned(cache.value) && PlanesFit(cache);
  return reads ? nullptr : kUnreadable;
}

// Values are transposed first, four channels at a time.
inline Reason Fp8Ragged(const RaggedKv& kv) {
  if (kv.dtype != DType::kE4M3 && kv.dtype != DType::kE5M2) return "the keys are not FP8";
  const bool reads = IsTmaStride(kv.key_token_stride, kv.dtype) &&
                     IsTmaStride(kv.key_head_stride, kv.dtype) && kv.value_token_stride % 4 == 0 &&
                     kv.value_head_stride % 4 == 0 && IsTmaAligned(kv.key) &&
                     IsTmaAligned(kv.value);
  return reads ? nullptr : kUnreadable;
}

inline Reason Q16Cache(const PagedCache& cache, DType query) {
  if (!IsTmaAligned(cache.key) || !IsTmaAligned(cache.value) || !PlanesFit(cache)) {
    return kUnreadable;
  }
  if (!IsQuantized(cache.type)) {
    return cache.dtype == query ? nullptr : "queries and keys have different types";
  }
  if (HasGroupScales(cache.type)) return "scales of groups have no kernel there";
  if (HasTwoCodes(cache.type)) return "keys and values have different codes";
  if (IsDynamic(cache.type) && cache.dtype == DType::kE5M2) {
    return "e5m2 times a token's scale does not fit fp16";
  }
  if (SizeOf(cache.dtype) != 1 || cache.dtype == DType::kUInt8) return "it knows no such codes";
  if (cache.layout != CacheLayout::kFastattn) return "the cache has another layout";
  const bool scales = cache.k_scales != nullptr && cache.v_scales != nullptr;
  return scales ? nullptr : "the cache has no scales";
}

inline Reason Q16Ragged(const RaggedKv& kv, DType query) {
  if (kv.dtype != query && (SizeOf(kv.dtype) != 1 || kv.dtype == DType::kUInt8)) {
    return "the keys have neither the queries' type nor 8 bits";
  }
  for (int64_t stride :
       {kv.key_token_stride, kv.key_head_stride, kv.value_token_stride, kv.value_head_stride}) {
    if (!IsTmaStride(stride, kv.dtype)) return kUnreadable;
  }
  return IsTmaAligned(kv.key) && IsTmaAligned(kv.value) ? nullptr : kUnreadable;
}

}  // namespace wgmma_support

inline constexpr Reason kGeneralCall =
    "the call has a tree mask, or windows or block tables of KV heads";
inline constexpr Reason kOtherHeadDim = "it is not compiled for heads of so many channels";

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

// What wgmma_sm90/fp8 lacks: it takes e4m3 queries over FP8 keys and values.
inline Reason WgmmaFp8Lacks(const AttentionParams& p) {
  if (p.IsGeneral()) return kGeneralCall;
  if (p.q_dtype != DType::kE4M3) return "its queries are not e4m3";
  if (!WgmmaFp8HeadDims::Has(p.head_dim)) return kOtherHeadDim;
  if (const Reason reason = wgmma_support::Common(p); reason != nullptr) return reason;
  const Reason reason =
      p.paged ? wgmma_support::Fp8Cache(p.cache) : wgmma_support::Fp8Ragged(p.ragged);
  if (reason != nullptr) return reason;
  const bool counts =
      (WgmmaFp8ValueBlocks(p) + 1) * p.num_kv_heads < std::numeric_limits<int>::max();
  return counts ? nullptr : "there are too many blocks";
}

// What wgmma_sm90/q16 lacks: it takes 16-bit queries over keys and values of 16, 8 or 4 bits.
inline Reason WgmmaQ16Lacks(const AttentionParams& p) {
  if (p.IsGeneral()) return kGeneralCall;
  if (p.q_dtype != DType::kBFloat16 && p.q_dtype != DType::kFloat16) {
    return "its queries are not bf16 or fp16";
  }
  const bool fits = SizeOf(KeyType(p)) == 2 ? Wgmma16BitHeadDims::Has(p.head_dim)
                    : p.paged               ? WgmmaCacheHeadDims::Has(p.head_dim)
                                            : WgmmaHeadDims::Has(p.head_dim);
  if (!fits) return kOtherHeadDim;
  if (const Reason reason = wgmma_support::Common(p); reason != nullptr) return reason;
  return p.paged ? wgmma_support::Q16Cache(p.cache, p.q_dtype)
                 : wgmma_support::Q16Ragged(p.ragged, p.q_dtype);
}

}  // namespace fastattn
