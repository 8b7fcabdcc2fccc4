// Formats as template arguments of kernels: K's and V's, which need not be the same.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include "formats/cache_format.h"

namespace fastattn {

// How one of K and V is stored.
template <DType kCodeValue, Scales kScalesValue>
struct SideFormat {
  static constexpr DType kCode = kCodeValue;
  static constexpr Scales kScales = kScalesValue;
  static constexpr bool kQuantized = InfoOf(kCode).bits <= 8;
  static constexpr bool kNibbles = CodesPerByte(kCode) == 2;
  static constexpr bool kDynamic = kScales != Scales::kStatic;
  // Channels that share a scale of a token, 0 where all do.
  static constexpr int kGroup = InfoOf(kScales).group;
  static constexpr bool kGrouped = kGroup != 0;
  static constexpr DType kScaleType = InfoOf(kScales).type;
  // Dynamic scales of a token with `channels` channels.
  static constexpr int TokenScales(int channels) {
    return kGrouped ? channels / std::max(kGroup, 1) : 1;
  }
};

template <typename K, typename V = K>
struct KvFormat {
  using Key = K;
  using Value = V;
};

namespace detail {

template <std::size_t kRow, typename F>
bool CallWithFormat(CacheType type, DType code, F& f) {
  constexpr const CacheFormat& kFormat = kCacheFormats[kRow];
  if (type != kFormat.type) return false;
  if (code == kFormat.code) {
    f(KvFormat<SideFormat<kFormat.code, kFormat.scales>,
               SideFormat<kFormat.value_code, kFormat.scales>>{});
    return true;
  }
  if constexpr (kFormat.other_code != kFormat.code) {
    if (code == kFormat.other_code) {
      f(KvFormat<SideFormat<kFormat.other_code, kFormat.scales>>{});
      return true;
    }
  }
  return false;
}

template <typename F, std::size_t... kRows>
bool DispatchRows(CacheType type, DType code, F& f, std::index_sequence<kRows...>) {
  return (CallWithFormat<kRows>(type, code, f) || ...);
}

}  // namespace detail

// Calls f(KvFormat<...>{}) for a cache of this type whose K has these codes. False where no row of
// the table has both.
template <typename F>
bool DispatchFormat(CacheType type, DType code, F&& f) {
  return detail::DispatchRows(type, code, f, std::make_index_sequence<kNumCacheTypes>{});
}

}  // namespace fastattn
