// Calls of an operator's function around Paddle's registry.
//
// At every call of a registered custom operator Paddle copies its table of all of them, which costs
// 10 us with the operators of this package and 150 us in a server with some hundred more. In
// dygraph the Python module fastattn._direct (direct_module.cc) therefore calls the same functions
// through the table that their declarations fill (operator.h); programs and C++ inference use the
// registered operators.
#pragma once

#include <string>
#include <vector>

#include "api/check.h"

namespace fastattn::api {

constexpr int kMostInputs = 24;
constexpr int kMostAttrs = 24;

// Value of an attribute; the member that counts follows from the operator's kinds.
struct DirectAttr {
  int64_t integer = 0;  // also a bool
  double real = 0.0;
  const char* text = nullptr;
  size_t text_size = 0;
};

// One operator. The inputs of `run` are null where an optional tensor is absent.
struct DirectOp {
  std::string name;  // as registered with Paddle
  void (*run)(Tensor* const* inputs, const DirectAttr* attrs, std::vector<Tensor>* outputs);
  std::vector<std::string> inputs;
  std::vector<bool> optional;
  std::vector<bool> strided;       // inputs whose strides `run` takes or refuses itself
  std::vector<std::string> attrs;  // such as "causal: bool"
  std::string kinds;               // an attribute each: i, l (64 bits), f, b or s
  std::vector<std::string> outputs;
  std::vector<int> output_inputs;  // index of the input that is written; -1: a result of `run`

  int num_inputs() const { return static_cast<int>(inputs.size()); }
};

// What the library hands to the module. Both are compiled with the same headers of Paddle; the
// first two fields tell whether they really were.
struct DirectTable {
  int version;
  size_t tensor_size;
  const std::vector<const DirectOp*>* ops;
  // Checks arguments as the operator's function does, and stops there.
  void (*check)(const DirectOp& op, Tensor* const* inputs, const DirectAttr* attrs);
};

// Counts the changes of the structures above.
constexpr int kDirectVersion = 6;
constexpr char kDirectTableSymbol[] = "fastattn_direct_table";

// Every operator of the library.
std::vector<const DirectOp*>& DirectOps();

}  // namespace fastattn::api
