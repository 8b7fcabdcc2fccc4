// The table of cache types. A type is a row: what a code is, and what a scale covers. Everything
// else that checks, kernels and Python ask of a type is derived from its row.
//
// CONTRIBUTING.md tells what else a new row needs.
#pragma once

#include <cstdint>

#include "formats/dtype.h"
#include "formats/host_device.h"

namespace fastattn {

// What one scale covers.
enum class ScaleScheme : int {
  kLayer,    // [1]
  kHead,     // [KV]
  kChannel,  // [KV * D]
  kToken,    // [num_blocks, KV, 64]: one a token and KV head
  kGroup,    // [num_blocks, KV, 64, D / group]: one for neighbouring channels of a token
  kNone,
};

// Scales as kernels are compiled for them.
enum class Scales : int {
  kStatic,  // none, or those that the layer holds: kLayer, kHead or kChannel at run time
  kToken,
  kGroup32UE8M0,
};

struct ScaleInfo {
  Scales scales;
  const char* name;  // in error messages
  int group;         // channels that share a scale of a token; 0: all of a head
  DType type;        // kFloat32: or bf16; others are bytes of uint8 tensors
};

inline constexpr ScaleInfo kScaleInfos[] = {
    {Scales::kStatic, "static", 0, DType::kFloat32},
    {Scales::kToken, "token", 0, DType::kFloat32},
    {Scales::kGroup32UE8M0, "group of 32", 32, DType::kUE8M0},
};

constexpr const ScaleInfo& InfoOf(Scales scales) { return kScaleInfos[static_cast<int>(scales)]; }

inline const char* NameOf(Scales scales) { return InfoOf(scales).name; }

// How a KV cache stores K and V (`cache_quant_type` of the Python API).
enum class CacheType : int {
  kNone,
  kInt8,
  kFp8,
  kBlockWiseInt8,
  kBlockWiseFp8,
  kBlockWiseInt4,
  kBlockWiseMxfp4,
  kBlockWiseK8V4,
  kBlockWiseKFp8V4,
};

struct CacheFormat {
  CacheType type;
  const char* name;
  DType code;        // of K
  DType value_code;  // of V
  DType other_code;  // of both that `fp8_format` or a tensor's dtype may name instead; else `code`
  Scales scales;
  ScaleScheme scheme;  // of scales that the layer holds: the finest that is taken
  bool in_fastdeploy;  // whether FastDeploy's fused operators have the type
};

// Types whose scales are written with the tokens come last.
inline constexpr CacheFormat kCacheFormats[] = {
    {CacheType::kNone, "none", DType::kBFloat16, DType::kBFloat16, DType::kFloat16, Scales::kStatic,
     ScaleScheme::kNone, true},
    {CacheType::kInt8, "cache_int8", DType::kInt8, DType::kInt8, DType::kInt8,  //
     Scales::kStatic, ScaleScheme::kChannel, true},
    {CacheType::kFp8, "cache_fp8", DType::kE4M3, DType::kE4M3, DType::kE5M2,  //
     Scales::kStatic, ScaleScheme::kHead, true},
    {CacheType::kBlockWiseInt8, "block_wise_int8", DType::kInt8, DType::kInt8, DType::kInt8,  //
     Scales::kToken, ScaleScheme::kToken, false},
    {CacheType::kBlockWiseFp8, "block_wise_fp8", DType::kE4M3, DType::kE4M3, DType::kE4M3,  //
     Scales::kToken, ScaleScheme::kToken, true},
    {CacheType::kBlockWiseInt4, "block_wise_int4", DType::kInt4, DType::kInt4, DType::kInt4,  //
     Scales::kToken, ScaleScheme::kToken, false},
    {CacheType::kBlockWiseMxfp4, "block_wise_mxfp4", DType::kE2M1, DType::kE2M1, DType::kE2M1,  //
     Scales::kGroup32UE8M0, ScaleScheme::kGroup, false},
    {CacheType::kBlockWiseK8V4, "block_wise_k8v4", DType::kInt8, DType::kInt4, DType::kInt8,  //
     Scales::kToken, ScaleScheme::kToken, false},
    {CacheType::kBlockWiseKFp8V4, "block_wise_kfp8v4", DType::kE4M3, DType::kInt4, DType::kE4M3,
     Scales::kToken, ScaleScheme::kToken, false},
};
inline constexpr int kNumCacheTypes = sizeof(kCacheFormats) / sizeof(kCacheFormats[0]);

constexpr const CacheFormat& FormatOf(CacheType type) {
  return kCacheFormats[static_cast<int>(type)];
}

inline const char* NameOf(CacheType type) { return FormatOf(type).name; }

// Codes of K or of V of a cache whose type has only one kind of them.
constexpr DType CodeOf(CacheType type, bool is_value) {
  return is_value ? FormatOf(type).value_code : FormatOf(type).code;
}

namespace detail {

// A bit for every type that has `holds`.
template <typename Predicate>
constexpr uint32_t CacheTypesOf(Predicate holds) {
  uint32_t found = 0;
  for (const CacheFormat& format : kCacheFormats) {
    if (holds(format)) found |= 1u << static_cast<int>(format.type);
  }
  return found;
}

inline constexpr uint32_t kDynamicTypes =
    CacheTypesOf([](const CacheFormat& format) { return format.scales != Scales::kStatic; });
inline constexpr uint32_t kGroupTypes =
    CacheTypesOf([](const CacheFormat& format) { return format.scheme == ScaleScheme::kGroup; });
inline constexpr uint32_t kInt8Types =
    CacheTypesOf([](const CacheFormat& format) { return format.code == DType::kInt8; });
inline constexpr uint32_t kNibbleKeys =
    CacheTypesOf([](const CacheFormat& format) { return CodesPerByte(format.code) == 2; });
inline constexpr uint32_t kNibbleValues =
    CacheTypesOf([](const CacheFormat& format) { return CodesPerByte(format.value_code) == 2; });

FASTATTN_HD constexpr bool Holds(uint32_t types, CacheType type) {
  return (types >> static_cast<int>(type) & 1) != 0;
}

constexpr uint32_t FirstDynamic() {
  uint32_t first = 0;
  while (!Holds(kDynamicTypes, static_cast<CacheType>(first))) ++first;
  return first;
}
inline constexpr uint32_t kFirstDynamic = FirstDynamic();
inline constexpr uint32_t kNumDynamic = kNumCacheTypes - kFirstDynamic;

constexpr bool CacheTableIsRight() {
  int index = 0;
  for (const ScaleInfo& info : kScaleInfos) {
    if (static_cast<int>(info.scales) != index++) return false;
  }
  index = 0;
  for (const CacheFormat& format : kCacheFormats) {
    if (static_cast<int>(format.type) != index++) return false;
    const bool by_token = format.scheme == ScaleScheme::kToken;
    const bool by_group = format.scheme == ScaleScheme::kGroup;
    if ((format.scales != Scales::kStatic) != (by_token || by_group)) return false;
    if ((InfoOf(format.scales).group != 0) != by_group) return false;
  }
  return kDynamicTypes == ((1u << kNumDynamic) - 1) << kFirstDynamic;
}
static_assert(CacheTableIsRight(), "rows in the order of their enums, dynamic types last");

}  // namespace detail

// These are asked at run time, too, on a device: comparisons and bits, no memory.

FASTATTN_HD constexpr bool IsQuantized(CacheType type) { return type != CacheType::kNone; }

// Whether a cache's scales are written with its tokens.
FASTATTN_HD constexpr bool IsDynamic(CacheType type) {
  return static_cast<uint32_t>(type) - detail::kFirstDynamic < detail::kNumDynamic;
}

// Whether a scale belongs to some channels of a token.
FASTATTN_HD constexpr bool HasGroupScales(CacheType type) {
  return detail::Holds(detail::kGroupTypes, type);
}

FASTATTN_HD constexpr bool IsInt8(CacheType type) {
  return detail::Holds(detail::kInt8Types, type);
}

// Codes in one element of K, and of V: 4-bit ones share a byte.
FASTATTN_HD constexpr int KeyCodesPerByte(CacheType type) {
  return detail::Holds(detail::kNibbleKeys, type) ? 2 : 1;
}
FASTATTN_HD constexpr int ValueCodesPerByte(CacheType type) {
  return detail::Holds(detail::kNibbleValues, type) ? 2 : 1;
}
FASTATTN_HD constexpr int CodesPerByte(CacheType type, bool is_value) {
  return is_value ? ValueCodesPerByte(type) : KeyCodesPerByte(type);
}

// Whether K or V has codes of 4 bits.
FASTATTN_HD constexpr bool HasNibbles(CacheType type) {
  return detail::Holds(detail::kNibbleKeys | detail::kNibbleValues, type);
}

// Whether K's codes and V's differ.
constexpr bool HasTwoCodes(CacheType type) {
  return FormatOf(type).code != FormatOf(type).value_code;
}

}  // namespace fastattn
