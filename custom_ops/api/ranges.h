// Ranges of integer attributes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "api/check.h"

namespace fastattn::api {

// Refuses an attribute outside [least, most].
inline int CheckRange(const char* op, const char* name, int64_t value, int64_t least,
                      int64_t most = std::numeric_limits<int>::max()) {
  if (value < least || value > most) {
    Fail("ValueError", op, name, "expected ", least, " to ", most, ", got ", value);
  }
  return static_cast<int>(value);
}

// A bound of lengths that the caller gives, such as max_seqlen_k: it may be beyond any length.
inline int LengthBound(const char* op, const char* name, int64_t length) {
  if (length < 0) Fail("ValueError", op, name, "expected at least 0, got ", length);
  return static_cast<int>(std::min<int64_t>(length, std::numeric_limits<int>::max()));
}

}  // namespace fastattn::api
