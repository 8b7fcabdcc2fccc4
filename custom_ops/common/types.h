// Plain enums shared by the operators' Params structs, the CPU kernels and the CUDA launchers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "formats/cache_format.h"
#include "formats/dtype.h"
#include "formats/host_device.h"

namespace fastattn {

// Tokens of one physical cache block. Every layout below depends on it.
inline constexpr int kBlockSize = 64;

enum class Fp8Format : int { kE4M3, kE5M2 };

// Byte order inside a block (see layout.h).
enum class CacheLayout : int { kFastattn, kFastDeploy, kLogical };

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
