// Element types of tensors and of stored codes: one row each. The table is for the host and for
// constants: it is no memory of a device.
#pragma once

#include <cstdint>

#include "formats/host_device.h"

namespace fastattn {

enum class DType : int {
  kFloat32,
  kFloat16,
  kBFloat16,
  kE4M3,
  kE5M2,
  kInt8,
  kUInt8,
  kInt4,   // two codes in a byte (common/int4.h)
  kE2M1,   // the same (common/fp4.h)
  kUE8M0,  // exponents of groups of codes (common/fp4.h)
};

enum class NumberKind : int { kFloat, kInteger, kExponent };

struct DTypeInfo {
  DType type;
  const char* name;  // in error messages
  int bits;
  NumberKind kind;
};

inline constexpr DTypeInfo kDTypes[] = {
    {DType::kFloat32, "float32", 32, NumberKind::kFloat},
    {DType::kFloat16, "float16", 16, NumberKind::kFloat},
    {DType::kBFloat16, "bfloat16", 16, NumberKind::kFloat},
    {DType::kE4M3, "float8_e4m3fn", 8, NumberKind::kFloat},
    {DType::kE5M2, "float8_e5m2", 8, NumberKind::kFloat},
    {DType::kInt8, "int8", 8, NumberKind::kInteger},
    {DType::kUInt8, "uint8", 8, NumberKind::kInteger},
    {DType::kInt4, "int4", 4, NumberKind::kInteger},
    {DType::kE2M1, "e2m1", 4, NumberKind::kFloat},
    {DType::kUE8M0, "ue8m0", 8, NumberKind::kExponent},
};

constexpr const DTypeInfo& InfoOf(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

inline const char* NameOf(DType dtype) { return InfoOf(dtype).name; }

// Bytes of one element of storage. Comparisons, as kernels ask at run time.
FASTATTN_HD constexpr int SizeOf(DType dtype) {
  return dtype == DType::kFloat32                                ? 4
         : dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? 2
                                                                 : 1;
}

namespace detail {

// A bit for every type of `bits`.
constexpr uint32_t TypesOf(int bits) {
  uint32_t found = 0;
  for (const DTypeInfo& info : kDTypes) {
    if (info.bits == bits) found |= 1u << static_cast<int>(info.type);
  }
  return found;
}

inline constexpr uint32_t kNibbleTypes = TypesOf(4);

constexpr bool TableIsRight() {
  int index = 0;
  for (const DTypeInfo& info : kDTypes) {
    if (static_cast<int>(info.type) != index++) return false;
    if (SizeOf(info.type) != (info.bits + 7) / 8) return false;
  }
  return true;
}
static_assert(TableIsRight(), "rows in the order of DType, and SizeOf says the same");

}  // namespace detail

// Codes of 4 bits share a byte.
FASTATTN_HD constexpr int CodesPerByte(DType dtype) {
  return (detail::kNibbleTypes >> static_cast<int>(dtype) & 1) != 0 ? 2 : 1;
}

}  // namespace fastattn
