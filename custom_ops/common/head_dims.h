// Head dimensions that the operators take; the table of instances (builder/instances.py) has the
// same ones in every family that is not excepted, which a test compares.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "common/dispatch.h"

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

using HeadDims = HeadDimList<64, 128>;

}  // namespace fastattn
