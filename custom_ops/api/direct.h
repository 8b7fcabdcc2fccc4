// Calls of an operator's function around Paddle's registry.
//
// At every call of a registered custom operator Paddle copies its table of all of them, which costs
// 10 us with the operators of this package and 150 us in a server with some hundred more. In
// dygraph the Python module fastattn._direct (direct_module.cc) therefore calls the same functions
// through the table that this file fills; programs and C++ inference use the registered operators.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/errors.h"
#include "api/step_arrivals.h"

namespace fastattn::api {

// Value of an attribute; the member that counts follows from the operator's kinds.
struct DirectAttr {
  int64_t integer = 0;  // also a bool
  double real = 0.0;
  const char* text = nullptr;
  size_t text_size = 0;
};

// One operator. The inputs of `run` are null where an optional tensor is absent.
struct DirectOp {
  const char* name;  // as registered with Paddle
  void (*run)(Tensor* const* inputs, const DirectAttr* attrs, std::vector<Tensor>* outputs);
  int num_inputs;
  std::string kinds;                 // an attribute each: i, l (64 bits), f, b or s
  std::vector<const char*> strided;  // inputs whose strides `run` takes or refuses itself

  // What the operator was registered with, filled in once all of them are known.
  std::vector<std::string> inputs;
  std::vector<bool> optional;
  std::vector<std::string> attrs;
  std::vector<std::string> outputs;
  std::vector<int> output_inputs;  // index of the input that is written; -1: a result of `run`
};

// What the library hands to the module. Both are compiled with the same headers of Paddle; the
// first two fields tell whether they really were.
struct DirectTable {
  int version;
  size_t tensor_size;
  const std::vector<DirectOp>* ops;
  StepArrivals*& (*current_step)();
  // Checks arguments as the operator's function does, and stops there.
  void (*check)(const DirectOp& op, Tensor* const* inputs, const DirectAttr* attrs);
};

// Counts the changes of the structures above.
constexpr int kDirectVersion = 4;
constexpr char kDirectTableSymbol[] = "fastattn_direct_table";

std::vector<DirectOp>& DirectOps();

namespace detail {

// Holds one argument of an operator's function while it runs.
template <typename T>
struct Held;

template <>
struct Held<const Tensor&> {
  static constexpr bool kInput = true;
  Held(Tensor* const* inputs, const DirectAttr*, int input, int) : tensor(*inputs[input]) {}
  const Tensor& Get() { return tensor; }
  Tensor& tensor;
};

template <>
struct Held<Tensor&> : Held<const Tensor&> {
  using Held<const Tensor&>::Held;
  Tensor& Get() { return tensor; }
};

template <>
struct Held<OptionalTensor&> {
  static constexpr bool kInput = true;
  Held(Tensor* const* inputs, const DirectAttr*, int input, int) {
    if (inputs[input] != nullptr) tensor = *inputs[input];
  }
  OptionalTensor& Get() { return tensor; }
  OptionalTensor tensor;
};

template <>
struct Held<const OptionalTensor&> : Held<OptionalTensor&> {
  using Held<OptionalTensor&>::Held;
};

template <typename T, char kLetter>
struct HeldNumber {
  static constexpr bool kInput = false;
  static constexpr char kKind = kLetter;
  HeldNumber(Tensor* const*, const DirectAttr* attrs, int, int attr) {
    if constexpr (std::is_floating_point_v<T>) {
      value = static_cast<T>(attrs[attr].real);
    } else {
      value = static_cast<T>(attrs[attr].integer);
    }
  }
  T Get() { return value; }
  T value;
};

template <>
struct Held<int> : HeldNumber<int, 'i'> {
  using HeldNumber::HeldNumber;
};
template <>
struct Held<int64_t> : HeldNumber<int64_t, 'l'> {
  using HeldNumber::HeldNumber;
};
template <>
struct Held<float> : HeldNumber<float, 'f'> {
  using HeldNumber::HeldNumber;
};
template <>
struct Held<bool> : HeldNumber<bool, 'b'> {
  using HeldNumber::HeldNumber;
};

template <>
struct Held<const std::string&> {
  static constexpr bool kInput = false;
  static constexpr char kKind = 's';
  Held(Tensor* const*, const DirectAttr* attrs, int, int attr)
      : text(attrs[attr].text, attrs[attr].text_size) {}
  const std::string& Get() { return text; }
  std::string text;
};

template <auto kFunction>
struct Direct;

// An operator's function takes its tensors first, then its attributes.
template <typename Result, typename... Args, Result (*kFunction)(Args...)>
struct Direct<kFunction> {
  static constexpr int kInputs = (int{Held<Args>::kInput} + ...);

  static std::string Kinds() {
    std::string kinds;
    const auto add = [&kinds](auto held) {
      using H = typename decltype(held)::type;
      if constexpr (!H::kInput) kinds += H::kKind;
    };
    (add(Identity<Held<Args>>{}), ...);
    return kinds;
  }

  static void Run(Tensor* const* inputs, const DirectAttr* attrs, std::vector<Tensor>* outputs) {
    RunAt(inputs, attrs, outputs, std::index_sequence_for<Args...>{});
  }

 private:
  template <typename T>
  struct Identity {
    using type = T;
  };

  template <size_t... I>
  static void RunAt(Tensor* const* inputs, const DirectAttr* attrs, std::vector<Tensor>* outputs,
                    std::index_sequence<I...>) {
    std::tuple<Held<Args>...> held{
        Held<Args>(inputs, attrs, static_cast<int>(I), static_cast<int>(I) - kInputs)...};
    if constexpr (std::is_void_v<Result>) {
      kFunction(std::get<I>(held).Get()...);
    } else {
      *outputs = kFunction(std::get<I>(held).Get()...);
    }
  }
};

}  // namespace detail

// Adds an operator to the table; a static object of each api file does so for each of its own.
template <auto kFunction>
bool AddDirect(const char* name, std::vector<const char*> strided = {}) {
  using Call = detail::Direct<kFunction>;
  DirectOps().push_back({name, Call::Run, Call::kInputs, Call::Kinds(), std::move(strided)});
  return true;
}

// Runs an operator's function for Paddle's registry. Its errors are Paddle's own (errors.h). Paddle
// wants a tensor for every output: one that the function leaves undefined because nobody asked for
// it becomes an element.
template <auto kFunction>
struct Registered;

template <typename Result, typename First, typename... Args, Result (*kFunction)(First, Args...)>
struct Registered<kFunction> {
  static Result Run(First first, Args... args) {
    return WithPaddleErrors([&]() -> Result {
      if constexpr (std::is_void_v<Result>) {
        kFunction(first, args...);
      } else {
        Result outputs = kFunction(first, args...);
        for (Tensor& output : outputs) {
          if (output.defined()) continue;
          output = paddle::empty({1}, phi::DataType::FLOAT32, first.place());
        }
        return outputs;
      }
    });
  }
};

}  // namespace fastattn::api
