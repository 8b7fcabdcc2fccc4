#include "api/operator.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <exception>
#include <unordered_map>

#include "api/errors.h"
#include "paddle/phi/api/ext/op_meta_info.h"

namespace fastattn::api {

namespace {

constexpr char kPrefix[] = "fastattn_";

bool IsPartOfName(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// Parameters in parentheses, each with its type: "const Strided<Tensor>& x".
std::vector<std::string> SplitParameters(const std::string& text) {
  std::vector<std::string> found;
  size_t begin = 1;
  while (begin < text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size() - 1);
    found.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return found;
}

std::string NameOfParameter(const std::string& parameter) {
  size_t begin = parameter.size();
  while (begin > 0 && IsPartOfName(parameter[begin - 1])) --begin;
  return parameter.substr(begin);
}

const char* TypeOf(char kind) {
  switch (kind) {
    case 'i':
      return "int";
    case 'l':
      return "int64_t";
    case 'f':
      return "float";
    case 'b':
      return "bool";
    default:
      return "std::string";
  }
}

DirectAttr ValueOf(const paddle::any& value, char kind) {
  DirectAttr attr;
  switch (kind) {
    case 'i':
      attr.integer = paddle::any_cast<int>(value);
      break;
    case 'l':
      attr.integer = paddle::any_cast<int64_t>(value);
      break;
    case 'f':
      attr.real = paddle::any_cast<float>(value);
      break;
    case 'b':
      attr.integer = paddle::any_cast<bool>(value);
      break;
    default: {
      const auto& text = paddle::any_cast<const std::string&>(value);
      attr.text = text.data();
      attr.text_size = text.size();
    }
  }
  return attr;
}

// The texts of `values` stay theirs.
void TakeValues(const Operator& op, const std::vector<paddle::any>& values, DirectAttr* attrs) {
  for (size_t i = 0; i < op.kinds.size(); ++i) {
    try {
      attrs[i] = ValueOf(values.at(i), op.kinds[i]);
    } catch (const paddle::bad_any_cast&) {
      PD_THROW("[TypeError] ", op.name, ": expected an attribute ", op.attrs[i]);
    }
  }
}

// A declaration whose results follow from what is no parameter. No handler of errors may hide it.
[[noreturn]] void EndForName(const Operator& op, const char* name) {
  std::fprintf(stderr, "%s has no parameter %s\n", op.name.c_str(), name);
  std::terminate();
}

// An exception would end the process while Paddle 3 traces a program, so arguments that the
// operator refuses have the results of unknown ones: the run says what is wrong.
Results ResultsOf(const Operator& op, const Known& known) {
  try {
    return op.results(known);
  } catch (const std::exception&) {
    return op.results(Known(op));
  }
}

// Hands results to Paddle.
template <typename Context>
auto Assign(Context* context, const Outputs& outputs, int)
    -> decltype(context->ValidateAndAssignOutputs(outputs)) {
  return context->ValidateAndAssignOutputs(outputs);
}

template <typename Context>
void Assign(Context* context, const Outputs& outputs, long) {  // Paddle 2.6
  const auto& places = *context->AllMutablePlainOutput();
  PD_CHECK(places.size() == outputs.size(), "expected ", places.size(), " results, got ",
           outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    paddle::AssignTensorImpl(outputs[i], places[i]);
  }
}

}  // namespace

Known::Known(const Operator& op) : op_(op), inputs_(op.inputs.size()) {}

Known::Known(const Operator& op, const std::vector<Shape>& shapes,
             const std::vector<paddle::any>& attrs)
    : Known(op) {
  for (size_t i = 0; i < inputs_.size(); ++i) inputs_[i].shape = shapes.at(i);
  TakeValues(op, attrs, attrs_);
}

Known::Known(const Operator& op, const std::vector<phi::DataType>& dtypes,
             const std::vector<paddle::any>& attrs)
    : Known(op) {
  for (size_t i = 0; i < inputs_.size(); ++i) inputs_[i].dtype = dtypes.at(i);
  TakeValues(op, attrs, attrs_);
}

const KnownInput& Known::operator[](const char* input) const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (op_.inputs[i] == input) return inputs_[i];
  }
  EndForName(op_, input);
}

const DirectAttr& Known::Find(const char* attr) const {
  const size_t size = std::strlen(attr);
  for (size_t i = 0; i < op_.attrs.size(); ++i) {
    if (op_.attrs[i].compare(0, size, attr) == 0 && op_.attrs[i][size] == ':') return attrs_[i];
  }
  EndForName(op_, attr);
}

namespace detail {

// Its errors are Paddle's own (errors.h). Paddle wants a tensor for every result: one that the
// function leaves undefined because nobody asked for it becomes an element.
void RunRegistered(const Operator& op, paddle::CustomOpKernelContext* context) {
  Outputs outputs = WithPaddleErrors([&] {
    Tensor* inputs[kMostInputs];
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      const size_t place = context->InputRangeAt(i).first;
      const bool absent = op.optional[i] && !context->OptionalInputAt(place);
      inputs[i] = absent ? nullptr : &context->MutableInputAt(place);
    }
    DirectAttr attrs[kMostAttrs];
    TakeValues(op, context->Attrs(), attrs);
    Outputs results;
    op.run(inputs, attrs, &results);
    for (Tensor& result : results) {
      if (result.defined()) continue;
      result = paddle::empty({1}, phi::DataType::FLOAT32, inputs[0]->place());
    }
    return results;
  });
  if (!outputs.empty()) Assign(context, outputs, 0);
}

std::vector<Shape> ShapesOf(const Operator& op, const std::vector<Shape>& inputs,
                            const std::vector<paddle::any>& attrs) {
  std::vector<Shape> shapes;
  for (const Result& result : ResultsOf(op, {op, inputs, attrs})) shapes.push_back(result.shape);
  return shapes;
}

std::vector<phi::DataType> DtypesOf(const Operator& op, const std::vector<phi::DataType>& inputs,
                                    const std::vector<paddle::any>& attrs) {
  std::vector<phi::DataType> dtypes;
  for (const Result& result : ResultsOf(op, {op, inputs, attrs})) dtypes.push_back(result.dtype);
  return dtypes;
}

bool Register(const char* name, const std::string& text,
              std::initializer_list<Parameter> parameters, const PaddleFunctions& functions,
              Operator* op) {
  op->name = std::string(kPrefix) + name;
  const std::vector<std::string> texts = SplitParameters(text);
  std::vector<std::string> inputs, outputs;  // the names with Paddle's mark of optional ones
  std::unordered_map<std::string, std::string> inplace;
  std::vector<int> written;
  for (const Parameter& parameter : parameters) {
    const std::string& of_this = texts.at(static_cast<size_t>(&parameter - parameters.begin()));
    const std::string plain = NameOfParameter(of_this);
    if (parameter.kind != 0) {
      op->attrs.push_back(plain + ": " + TypeOf(parameter.kind));
      op->kinds += parameter.kind;
      continue;
    }
    const auto marked = [&](const std::string& tensor) {
      return parameter.optional ? paddle::Optional(tensor) : tensor;
    };
    if (parameter.written) {
      written.push_back(static_cast<int>(inputs.size()));
      inplace[marked(plain)] = marked(plain + "_out");
    }
    inputs.push_back(marked(plain));
    op->inputs.push_back(plain);
    op->optional.push_back(parameter.optional);
    op->strided.push_back(parameter.written || of_this.find("Strided<") != std::string::npos);
  }
  // This also asks for all names that `results` uses.
  for (const Result& result : op->results(Known(*op))) {
    op->outputs.push_back(result.name);
    op->output_inputs.push_back(-1);
  }
  outputs = op->outputs;
  for (const int input : written) {
    op->outputs.push_back(op->inputs[input] + "_out");
    op->output_inputs.push_back(input);
    outputs.push_back(inplace.at(inputs[input]));
  }
  DirectOps().push_back(op);
  paddle::OpMetaInfoBuilder(std::string(op->name), 0)
      .Inputs(std::move(inputs))
      .Outputs(std::move(outputs))
      .Attrs(std::vector<std::string>(op->attrs))
      .SetInplaceMap(std::move(inplace))
      .SetKernelFn(functions.kernel)
      .SetInferShapeFn(functions.shapes)
      .SetInferDtypeFn(functions.dtypes);
  return true;
}

}  // namespace detail

}  // namespace fastattn::api
