// Which variants of a launcher are compiled, and the choice of the one that a call needs.
//
// The build writes the lists, cuda/**/instances.h, from the table that it writes the explicit
// instantiations from (builder/instances.py): what can be chosen is compiled, and the other way
// round.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/dispatch.h"

namespace fastattn {

// A variant, by the template arguments of its launcher.
template <auto... kValues>
struct Instance {};

template <typename... Variants>
struct InstanceList {};

// The template argument that a call needs. Errors call it `name`.
template <typename T>
struct Wanted {
  const char* name;
  T value;
};

template <typename T>
Wanted(const char*, T) -> Wanted<T>;

namespace detail {

inline constexpr std::size_t kNoColumn = static_cast<std::size_t>(-1);

// Whether a variant has the wanted arguments, that of column `except` aside.
template <auto... kValues, typename... Ts, std::size_t... kColumns>
bool Fits(Instance<kValues...>, const std::tuple<Wanted<Ts>...>& wanted, std::size_t except,
          std::index_sequence<kColumns...>) {
  return ((kColumns == except || std::get<kColumns>(wanted).value == static_cast<Ts>(kValues)) &&
          ...);
}

template <std::size_t kColumn, auto... kValues>
std::string ArgumentName(Instance<kValues...>) {
  return ValueName(
      std::get<kColumn>(std::tuple<std::remove_const_t<decltype(kValues)>...>{kValues...}));
}

// Values of a column in the variants that have all other arguments as wanted, or nothing.
template <std::size_t kColumn, typename... Variants, typename... Ts>
std::string Supported(InstanceList<Variants...>, const std::tuple<Wanted<Ts>...>& wanted) {
  std::string all;
  const auto add = [&all](const std::string& name) {
    if ((", " + all + ",").find(", " + name + ",") != std::string::npos) return;
    all += (all.empty() ? "" : ", ") + name;
  };
  constexpr std::index_sequence_for<Ts...> kColumns;
  ((Fits(Variants{}, wanted, kColumn, kColumns) ? add(ArgumentName<kColumn>(Variants{})) : void()),
   ...);
  return all;
}

// Says which argument no variant has together with the others, else all of them.
template <typename List, typename... Ts, std::size_t... kColumns>
[[noreturn]] void Refuse(List list, const std::tuple<Wanted<Ts>...>& wanted,
                         std::index_sequence<kColumns...>) {
  const auto text = [](const auto& argument) {
    return std::string(argument.name) + " = " + ValueName(argument.value);
  };
  std::string message;
  const auto explain = [&](const auto& argument, const std::string& supported) {
    if (!message.empty() || supported.empty()) return;
    message = text(argument) + " is not supported; supported: " + supported;
  };
  (explain(std::get<kColumns>(wanted), Supported<kColumns>(list, wanted)), ...);
  if (message.empty()) {
    ((message += (kColumns == 0 ? "" : ", ") + text(std::get<kColumns>(wanted))), ...);
    message += " is not supported together";
  }
  throw std::invalid_argument(message);
}

}  // namespace detail

// Whether the variant is compiled.
template <typename... Variants, typename... Ts>
bool IsCompiled(InstanceList<Variants...>, const std::tuple<Wanted<Ts>...>& wanted) {
  constexpr std::index_sequence_for<Ts...> kColumns;
  return (detail::Fits(Variants{}, wanted, detail::kNoColumn, kColumns) || ...);
}

namespace detail {

template <typename F, auto... kValues>
void CallWith(F& f, Instance<kValues...>) {
  f(std::integral_constant<std::remove_const_t<decltype(kValues)>, kValues>{}...);
}

}  // namespace detail

// Calls f(std::integral_constant<...>{}...) with the arguments of the wanted variant as constants.
// Throws std::invalid_argument that says what is supported where none is compiled.
template <typename... Variants, typename... Ts, typename F>
void dispatch(InstanceList<Variants...> list, const std::tuple<Wanted<Ts>...>& wanted, F&& f) {
  constexpr std::index_sequence_for<Ts...> kColumns;
  const bool found = ((detail::Fits(Variants{}, wanted, detail::kNoColumn, kColumns)
                           ? (detail::CallWith(f, Variants{}), true)
                           : false) ||
                      ...);
  if (!found) detail::Refuse(list, wanted, kColumns);
}

}  // namespace fastattn
