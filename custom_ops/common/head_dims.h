// Head dimensions that the operators take; the table of instances (builder/instances.py) has the
// same ones in every family that is not excepted, which a test compares.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "common/dispatch.h"
#include "common/types.h"

namespace fastattn {

// What a build compiles of all head dimensions, a bit for each 32 channels: all, or what
// FASTATTN_HEAD_DIMS names (builder/instances.py).
constexpr uint32_t kAllHeadDimBits = 0x15C;
#if !defined(FASTATTN_HEAD_DIM_BITS)
#define FASTATTN_HEAD_DIM_BITS kAllHeadDimBits
#endif

template <int... kValues>
struct HeadDimList {
  static constexpr int kDims[] = {kValues...};

  static constexpr bool Has(int64_t head_dim) { return ((head_dim == kValues) || ...); }

  // The values, for a text of an error.
  static std::string Text() {
    std::string text;
    ((text += (text.empty() ? "" : ", ") + std::to_string(kValues)), ...);
    if (FASTATTN_HEAD_DIM_BITS != kAllHeadDimBits) {
      text += " (FASTATTN_HEAD_DIMS left out the others when this was built)";
    }
    return text;
  }

  template <typename F>
  static void Dispatch(int head_dim, F&& f) {
    dispatch<kValues...>(head_dim, "head_dim", std::forward<F>(f));
  }
};

constexpr bool IsCompiled(int head_dim) { return FASTATTN_HEAD_DIM_BITS >> head_dim / 32 & 1; }

template <typename Kept, int... kRest>
struct CompiledDims {
  using Type = Kept;
};
template <int... kKept, int kFirst, int... kRest>
struct CompiledDims<HeadDimList<kKept...>, kFirst, kRest...>
    : CompiledDims<std::conditional_t<IsCompiled(kFirst), HeadDimList<kKept..., kFirst>,
                                      HeadDimList<kKept...>>,
                   kRest...> {};

// Of heads of which V has as many channels as K: those of fused qkv tensors.
using HeadDims = CompiledDims<HeadDimList<>, 64, 96, 128, 256>::Type;
// Of attention's queries and keys, and so of K in a cache.
using AttentionHeadDims = CompiledDims<HeadDimList<>, 64, 96, 128, 192, 256>::Type;

// Channels of a head of V, and of the output, whose Q and K have so many: multi-head latent
// attention without absorption has 128 of them beside 192.
FASTATTN_HD constexpr int ValueDim(int head_dim) { return head_dim == 192 ? 128 : head_dim; }

}  // namespace fastattn
