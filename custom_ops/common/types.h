// Plain enums shared by the operators' Params structs, the CPU kernels and the CUDA launchers.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define FASTATTN_HD __host__ __device__ __forceinline__
#else
#define FASTATTN_HD inline
#endif

namespace fastattn {

// Tokens of one physical cache block. Every layout below depends on it.
inline constexpr int kBlockSize = 64;

enum class DType : int {
  kFloat32,
  kFloat16,
  kBFloat16,
  kE4M3,
  kE5M2,
  kInt8,
  kUInt8,
  kInt4,  // two codes in a byte (common/int4.h)
  kE2M1,  // the same (common/fp4.h)
};

// How a KV cache stores K and V (`cache_quant_type` of the Python API).
enum class CacheType : int {
  kNone,            // bf16 / fp16 values
  kInt8,            // int8 codes, static scales
  kFp8,             // e4m3 or e5m2 codes, static scales
  kBlockWiseInt8,   // int8 codes, one dynamic scale a token and KV head
  kBlockWiseFp8,    // e4m3 codes, one dynamic scale a token and KV head
  kBlockWiseInt4,   // 4-bit codes, one dynamic scale a token and KV head
  kBlockWiseMxfp4,  // E2M1 codes, one UE8M0 scale for 32 channels of a token
};

enum class Fp8Format : int { kE4M3, kE5M2 };

// Byte order inside a block (see layout.h).
enum class CacheLayout : int { kFastattn, kFastDeploy, kLogical };

// What one element of a static scale tensor covers.
enum class ScaleGranularity : int {
  kTensor,   // [1]
  kHead,     // [KV]
  kChannel,  // [KV * D], int8 only
  kToken,    // [num_blocks, KV, 64], dynamic types
};

FASTATTN_HD constexpr bool IsQuantized(CacheType type) { return type != CacheType::kNone; }

FASTATTN_HD constexpr bool IsDynamic(CacheType type) {
  return type == CacheType::kBlockWiseInt8 || type == CacheType::kBlockWiseFp8 ||
         type == CacheType::kBlockWiseInt4 || type == CacheType::kBlockWiseMxfp4;
}

FASTATTN_HD constexpr bool IsInt8(CacheType type) {
  return type == CacheType::kInt8 || type == CacheType::kBlockWiseInt8;
}

// Codes in one element of a cache: 4-bit ones share a byte.
FASTATTN_HD constexpr int CodesPerByte(CacheType type) {
  return type == CacheType::kBlockWiseInt4 || type == CacheType::kBlockWiseMxfp4 ? 2 : 1;
}

FASTATTN_HD constexpr int CodesPerByte(DType dtype) {
  return dtype == DType::kInt4 || dtype == DType::kE2M1 ? 2 : 1;
}

// Codes of a cache whose type has only one kind.
FASTATTN_HD constexpr DType CodeOf(CacheType type) {
  return type == CacheType::kBlockWiseMxfp4  ? DType::kE2M1
         : type == CacheType::kBlockWiseInt4 ? DType::kInt4
         : IsInt8(type)                      ? DType::kInt8
                                             : DType::kE4M3;
}

// Elements of a dynamic scale's group: those of a whole head, or 32 channels.
FASTATTN_HD constexpr bool HasBlockScales(CacheType type) {
  return type == CacheType::kBlockWiseMxfp4;
}

// Bytes of one element of storage.
FASTATTN_HD constexpr int SizeOf(DType dtype) {
  return dtype == DType::kFloat32                                ? 4
         : dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2
                                                                 : 1;
}

// Names in error messages and in dispatch failures.
inline const char* NameOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kE4M3:
      return "float8_e4m3fn";
    case DType::kE5M2:
      return "float8_e5m2";
    case DType::kInt8:
      return "int8";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt4:
      return "int4";
    case DType::kE2M1:
      return "e2m1";
  }
  return "unknown";
}

inline const char* NameOf(CacheType type) {
  switch (type) {
    case CacheType::kNone:
      return "none";
    case CacheType::kInt8:
      return "cache_int8";
    case CacheType::kFp8:
      return "cache_fp8";
    case CacheType::kBlockWiseInt8:
      return "block_wise_int8";
    case CacheType::kBlockWiseFp8:
      return "block_wise_fp8";
    case CacheType::kBlockWiseInt4:
      return "block_wise_int4";
    case CacheType::kBlockWiseMxfp4:
      return "block_wise_mxfp4";
  }
  return "unknown";
}

inline const char* NameOf(CacheLayout layout) {
  switch (layout) {
    case CacheLayout::kFastattn:
      return "fastattn";
    case CacheLayout::kFastDeploy:
      return "fastdeploy";
    case CacheLayout::kLogical:
      return "logical";
  }
  return "unknown";
}

}  // namespace fastattn
