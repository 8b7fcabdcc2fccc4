// What a kernel that writes a step's new tokens is compiled for.
#pragma once

#include <cstdint>

#include "common/head_dims.h"
#include "common/types.h"
#include "formats/kv_format.h"
#include "params/rope.h"

namespace fastattn::cuda {

// write_cache_kv: K and V come as they are, and there are no Q heads.
struct NoRope {
  static constexpr bool kRope = false;
  static constexpr bool kBias = false;
  static constexpr bool kNorm = false;
  static constexpr bool kAny = false;
  static constexpr bool kPartial = false;
  static constexpr bool kAsked = false;
};

// What happens to a head before it is rounded to the input's type. kBias and kNorm are there, and
// lie at multiples of 16 bytes; the rotation, if there is one, takes whole heads and its table can
// be read 16 bytes at a time. With kAsked, run time decides whether there are a bias and norm
// weights (of those named). With kPartial, too, and the rotation is as IsPartialRope says. With
// kAny, too, and they may lie anywhere; any rotary_dim, any table.
template <bool kBias_, bool kNorm_, bool kAny_ = false, bool kPartial_ = false,
          bool kAsked_ = kAny_ || kPartial_>
struct RopeOptions {
  static constexpr bool kRope = true;
  static constexpr bool kBias = kBias_;
  static constexpr bool kNorm = kNorm_;
  static constexpr bool kAny = kAny_;
  static constexpr bool kPartial = kPartial_;
  static constexpr bool kAsked = kAsked_;  // whether there are a bias and norm weights
};

// Whether a step's parameters, and its table if it rotates, can be read 16 bytes at a time.
inline bool IsVectorRope(const RopeWriteCacheParams& p) {
  const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  const uintptr_t parameters =
      address(p.bias) | address(p.q_norm_weight) | address(p.k_norm_weight);
  if (parameters % 16 != 0) return false;
  if (p.style == RotaryStyle::kNone) return true;
  return p.rotary_step == 1 && p.rotary_stride % 4 == 0 &&
         (address(p.cos) | address(p.sin)) % 16 == 0;
}

// Whether they are as RopeOptions without kAny and kPartial takes them.
inline bool IsCommonRope(const RopeWriteCacheParams& p) {
  return IsVectorRope(p) && (p.style == RotaryStyle::kNone || p.rotary_dim == p.cache.head_dim);
}

// Whether they are as kPartial takes them: the lanes of 8 or 16 channels that rotate do so wholly,
// and those of neox partners are a power of 2 apart.
inline bool IsPartialRope(const RopeWriteCacheParams& p) {
  if (!IsVectorRope(p) || p.style == RotaryStyle::kNone) return false;
  if (p.rotary_dim > p.cache.head_dim / 2 || p.rotary_dim % 16 != 0) return false;
  return p.style == RotaryStyle::kInterleaved || (p.rotary_dim & (p.rotary_dim - 1)) == 0;
}

// Calls f(options) with what a step asks for. Models with heads of other sizes have no bias, and
// those of 96 channels no norm: what they do not need takes the kernel of any option.
template <int kHeadDim, typename F>
void DispatchRope(const RopeWriteCacheParams& p, F&& f) {
  const bool bias = p.bias != nullptr;
  const bool norm = p.q_norm_weight != nullptr || p.k_norm_weight != nullptr;
  constexpr bool kFew = kHeadDim != 64 && kHeadDim != 128, kNorm = kHeadDim != 96;
  if constexpr (kFew) {
    if (kNorm && IsPartialRope(p)) {
      if constexpr (kNorm) f(RopeOptions<true, true, false, true>{});
    } else if (bias || (norm && !kNorm) || !IsCommonRope(p)) {
      f(RopeOptions<true, true, true>{});
    } else if (norm) {
      if constexpr (kNorm) f(RopeOptions<false, true>{});
    } else {
      f(RopeOptions<false, false>{});
    }
  } else if (IsPartialRope(p)) {
    f(RopeOptions<true, true, false, true>{});
  } else if (!IsCommonRope(p)) {
    f(RopeOptions<true, true, true>{});
  } else if (bias && norm) {
    f(RopeOptions<true, true>{});
  } else if (bias) {
    f(RopeOptions<true, false>{});
  } else if (norm) {
    f(RopeOptions<false, true>{});
  } else {
    f(RopeOptions<false, false>{});
  }
}

// The same with fewer variants, for steps that transform K: they are rare.
template <int kHeadDim, typename F>
void DispatchTransformRope(const RopeWriteCacheParams& p, F&& f) {
  if constexpr (kHeadDim == 64 || kHeadDim == 128) {
    if (IsCommonRope(p)) {
      const bool neither =
          p.bias == nullptr && p.q_norm_weight == nullptr && p.k_norm_weight == nullptr;
      if (neither) {
        f(RopeOptions<false, false>{});
      } else {
        f(RopeOptions<true, true, false, false, true>{});
      }
      return;
    }
  }
  f(RopeOptions<true, true, true>{});
}

// kTransformsKey: K is transformed before it is quantised, as the kernel's parameters say
// (params/key_transform.h). kCode: of K, and kValueCode: of V.
template <DType kIn_, Scales kScales_, DType kCode_, int kHeadDim_, typename Options_,
          bool kTransformsKey_ = false, DType kValueCode_ = kCode_>
struct StepTraits {
  using Options = Options_;
  static constexpr DType kIn = kIn_;
  using Side = SideFormat<kCode_, kScales_>;  // how K is stored
  static constexpr DType kCode = kCode_;      // of its cache: codes, or 16-bit values
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRope = Options::kRope;
  static constexpr bool kQuantized = Side::kQuantized;
  static constexpr bool kNibbles = Side::kNibbles;
  static constexpr int kCodeBytes = kHeadDim / CodesPerByte(kCode);  // of a token
  // The same for heads of V, which may have fewer channels, or other codes.
  static constexpr bool kOwnValue = ValueDim(kHeadDim) != kHeadDim || kValueCode_ != kCode;
  using Value =
      StepTraits<kIn, kScales_, kValueCode_, ValueDim(kHeadDim), Options, kTransformsKey_>;
  // Dynamic scales of a token and KV head.
  static constexpr int kTokenScales = Side::TokenScales(kHeadDim);
  static constexpr bool kTransformsKey = kTransformsKey_;
  static_assert(kQuantized || !kTransformsKey, "K is transformed for its codes");
};

}  // namespace fastattn::cuda
