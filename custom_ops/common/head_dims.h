// Head dimensions that the operators take; the table of instances (builder/instances.py) has the
// same ones in every family that is not excepted, which a test compares.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "common/dispatch.h"
#include "common/types.h"

namespace fastattn {

template <int... kValues>
struct HeadDimList {
  static constexpr int kDims[] = {kValues...};

  static constexpr bool kPowersOfTwo = (((kValues & (kValues - 1)) == 0) && ...);

  static constexpr bool Has(int64_t head_dim) { return ((head_dim == kValues) || ...); }

  static std::string Text() {
    std::string text;
    ((text += (text.empty() ? "" : ", ") + std::to_string(kValues)), ...);
    return text;
  }

  template <typename F>
  static void Dispatch(int head_dim, F&& f) {
    dispatch<kValues...>(head_dim, "head_dim", std::forward<F>(f));
  }
};

// Of a cache.
using HeadDims = HeadDimList<64, 128, 256>;
// Of attention's queries and keys, which flash_attention takes.
using AttentionHeadDims = HeadDimList<64, 128, 192, 256>;

// Channels of a head of V, and of the output, whose Q and K have so many: multi-head latent
// attention without absorption has 128 of them beside 192.
FASTATTN_HD constexpr int ValueDim(int head_dim) { return head_dim == 192 ? 128 : head_dim; }

}  // namespace fastattn
