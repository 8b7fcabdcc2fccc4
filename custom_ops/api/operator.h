// An operator from one declaration: the head of its function.
//
//   Results ScaleResults(const Known& in) { return {{"scaled", in["x"].shape, in["x"].dtype}}; }
//
//   FASTATTN_OPERATOR(Outputs, kOp, Scale, ScaleResults,
//                     (const Strided<Tensor>& x, OptionalTensor& out, float factor)) {
//     ...checks, EndOfChecks() or RequireCpu(), the kernel...
//     return {scaled};
//   }
//
// The parameters tell the rest: names, types and order of the inputs and, after them, of the
// attributes (bool, int, int64_t, float or const std::string&). A tensor that is not const is
// written in place, and Paddle sees it as an output `<name>_out` after the results. All else comes
// from the declaration: Paddle's registration with its functions of shapes and dtypes, the direct
// call (direct.h), and the checks while a program is traced, which the function itself makes
// (direct_check.h).
#pragma once

#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "api/check.h"
#include "api/direct.h"
#include "paddle/utils/any.h"

namespace paddle {
class CustomOpKernelContext;
}

namespace fastattn::api {

// What an operator's function returns: its results without the tensors that it writes in place. A
// result that nobody asked for is an undefined tensor.
using Outputs = std::vector<Tensor>;

// A tensor of any strides: the function takes or refuses them itself. Other tensors come
// contiguous, as a copy where the caller's is not, apart from those that are written. Register()
// reads this word in the text of the parameters.
template <typename T>
using Strided = T;

// What a program knows of an input.
struct KnownInput {
  Shape shape;  // a size of -1 is unknown
  phi::DataType dtype = phi::DataType::UNDEFINED;

  bool given() const { return !shape.empty() || dtype != phi::DataType::UNDEFINED; }
  int64_t size(size_t i) const { return i < shape.size() ? shape[i] : -1; }
};

struct Operator;

// What a program knows of an operator's arguments. Paddle asks for the shapes of the results with
// those of the inputs, and for the dtypes with the dtypes, so one of the two is always missing.
class Known {
 public:
  explicit Known(const Operator& op);  // nothing: no tensor, and attributes of 0
  Known(const Operator& op, const std::vector<Shape>& shapes,
        const std::vector<paddle::any>& attrs);
  Known(const Operator& op, const std::vector<phi::DataType>& dtypes,
        const std::vector<paddle::any>& attrs);

  // Of a parameter. Another name ends the process, mostly as soon as the library is loaded.
  const KnownInput& operator[](const char* input) const;
  bool Flag(const char* attr) const { return Find(attr).integer != 0; }
  int64_t Integer(const char* attr) const { return Find(attr).integer; }
  std::string Text(const char* attr) const { return {Find(attr).text, Find(attr).text_size}; }

 private:
  const DirectAttr& Find(const char* attr) const;

  const Operator& op_;
  std::vector<KnownInput> inputs_;
  DirectAttr attrs_[kMostAttrs];
};

// A result of an operator, as far as it follows from what is known. The function that tells the
// results gives the same names whatever is known.
struct Result {
  const char* name;
  Shape shape;
  phi::DataType dtype;
};

using Results = std::vector<Result>;

// What infer() gives, or `fallback` where it throws for arguments that the operator refuses.
template <typename T, typename F>
T Inferred(T fallback, F&& infer) {
  try {
    return infer();
  } catch (const std::exception&) {
    return fallback;
  }
}

// Of an operator that writes everything in place.
inline Results NoResults(const Known&) { return {}; }

// An operator as it was declared.
struct Operator : DirectOp {
  Results (*results)(const Known& in);
};

namespace detail {

// What a parameter's type tells of it.
struct Parameter {
  char kind;  // of an attribute, as in DirectOp::kinds; 0: an input
  bool optional;
  bool written;
};

// Holds one argument of an operator's function while it runs.
template <typename T>
struct Held;

template <>
struct Held<const Tensor&> {
  static constexpr Parameter kParameter{0, false, false};
  Held(Tensor* const* inputs, const DirectAttr*, int input, int) : tensor(*inputs[input]) {}
  const Tensor& Get() { return tensor; }
  Tensor& tensor;
};

template <>
struct Held<Tensor&> : Held<const Tensor&> {
  static constexpr Parameter kParameter{0, false, true};
  using Held<const Tensor&>::Held;
  Tensor& Get() { return tensor; }
};

template <>
struct Held<const OptionalTensor&> {
  static constexpr Parameter kParameter{0, true, false};
  Held(Tensor* const* inputs, const DirectAttr*, int input, int) {
    if (inputs[input] != nullptr) tensor = *inputs[input];
  }
  OptionalTensor& Get() { return tensor; }
  OptionalTensor tensor;
};

template <>
struct Held<OptionalTensor&> : Held<const OptionalTensor&> {
  static constexpr Parameter kParameter{0, true, true};
  using Held<const OptionalTensor&>::Held;
};

template <typename T, char kLetter>
struct HeldNumber {
  static constexpr Parameter kParameter{kLetter, false, false};
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
  static constexpr Parameter kParameter{'s', false, false};
  Held(Tensor* const*, const DirectAttr* attrs, int, int attr)
      : text(attrs[attr].text, attrs[attr].text_size) {}
  const std::string& Get() { return text; }
  std::string text;
};

// What Paddle calls of an operator.
struct PaddleFunctions {
  void (*kernel)(paddle::CustomOpKernelContext*);
  std::vector<Shape> (*shapes)(const std::vector<Shape>&, const std::vector<std::vector<Shape>>&,
                               const std::vector<paddle::any>&);
  std::vector<phi::DataType> (*dtypes)(const std::vector<phi::DataType>&,
                                       const std::vector<std::vector<phi::DataType>>&,
                                       const std::vector<paddle::any>&);
};

// The functions' bodies, and what `text`, the parameters in parentheses, tells besides their types.
void RunRegistered(const Operator& op, paddle::CustomOpKernelContext* context);
std::vector<Shape> ShapesOf(const Operator& op, const std::vector<Shape>& inputs,
                            const std::vector<paddle::any>& attrs);
std::vector<phi::DataType> DtypesOf(const Operator& op, const std::vector<phi::DataType>& inputs,
                                    const std::vector<paddle::any>& attrs);
bool Register(const char* name, const std::string& text,
              std::initializer_list<Parameter> parameters, const PaddleFunctions& functions,
              Operator* op);

// An operator by its function, whose type tells the parameters.
template <auto kFunction>
struct Declared;

template <typename Returned, typename... Args, Returned (*kFunction)(Args...)>
struct Declared<kFunction> {
  static constexpr int kInputs = (int{Held<Args>::kParameter.kind == 0} + ...);
  static_assert(kInputs <= kMostInputs && int{sizeof...(Args)} - kInputs <= kMostAttrs);

  static Operator& Op() {
    static Operator op;
    return op;
  }

  static bool Add(const char* name, const char* parameters, Results (*results)(const Known&)) {
    Op().run = Run;
    Op().results = results;
    return Register(name, parameters, {Held<Args>::kParameter...}, {Kernel, Shapes, Dtypes}, &Op());
  }

 private:
  static void Run(Tensor* const* inputs, const DirectAttr* attrs, Outputs* outputs) {
    RunAt(inputs, attrs, outputs, std::index_sequence_for<Args...>{});
  }

  template <size_t... I>
  static void RunAt(Tensor* const* inputs, const DirectAttr* attrs, Outputs* outputs,
                    std::index_sequence<I...>) {
    std::tuple<Held<Args>...> held{
        Held<Args>(inputs, attrs, static_cast<int>(I), static_cast<int>(I) - kInputs)...};
    if constexpr (std::is_void_v<Returned>) {
      kFunction(std::get<I>(held).Get()...);
    } else {
      *outputs = kFunction(std::get<I>(held).Get()...);
    }
  }

  static void Kernel(paddle::CustomOpKernelContext* context) { RunRegistered(Op(), context); }

  static std::vector<Shape> Shapes(const std::vector<Shape>& inputs,
                                   const std::vector<std::vector<Shape>>&,
                                   const std::vector<paddle::any>& attrs) {
    return ShapesOf(Op(), inputs, attrs);
  }

  static std::vector<phi::DataType> Dtypes(const std::vector<phi::DataType>& inputs,
                                           const std::vector<std::vector<phi::DataType>>&,
                                           const std::vector<paddle::any>& attrs) {
    return DtypesOf(Op(), inputs, attrs);
  }
};

}  // namespace detail

}  // namespace fastattn::api

// Begins the definition of an operator's function. `returned` is Outputs, or void where `results`
// is NoResults; `name` is the operator's without the prefix.
#define FASTATTN_OPERATOR(returned, name, Function, results, parameters)             \
  returned Function parameters;                                                      \
  [[maybe_unused]] static const bool is_declared_##Function =                        \
      ::fastattn::api::detail::Declared<&Function>::Add(name, #parameters, results); \
  returned Function parameters
