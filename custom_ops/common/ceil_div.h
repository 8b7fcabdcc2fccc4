#pragma once

#include "common/types.h"

namespace fastattn {

// a / b rounded up, for a >= 0 and b > 0, in the wider of both types.
template <typename A, typename B>
FASTATTN_HD constexpr auto CeilDiv(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace fastattn
