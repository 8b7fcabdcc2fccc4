// A runtime value becomes a template parameter here and nowhere else.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/types.h"

namespace fastattn {

namespace detail {

template <typename T>
std::string ValueName(T value) {
  if constexpr (std::is_enum_v<T>) {
    return NameOf(value);
  } else {
    return std::to_string(value);
  }
}

}  // namespace detail

// Calls f(std::integral_constant<decltype(v), v>{}) for the v of kValues that equals `value`.
// Throws std::invalid_argument that lists the supported values when none does.
template <auto... kValues, typename T, typename F>
void dispatch(T value, const char* name, F&& f) {
  const bool found = ((value == static_cast<T>(kValues)
                           ? (f(std::integral_constant<decltype(kValues), kValues>{}), true)
                           : false) ||
                      ...);
  if (!found) {
    std::string supported;
    ((supported += (supported.empty() ? "" : ", ") + detail::ValueName(kValues)), ...);
    throw std::invalid_argument(std::string(name) + " = " + detail::ValueName(value) +
                                " is not supported; supported: " + supported);
  }
}

}  // namespace fastattn
