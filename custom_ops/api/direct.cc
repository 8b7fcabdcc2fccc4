#include "api/direct.h"

namespace fastattn::api {

namespace {

constexpr char kOptionalMark[] = "@OPTIONAL";

// Paddle marks the names of optional tensors.
std::string Plain(const std::string& name) { return name.substr(0, name.find(kOptionalMark)); }

std::vector<std::string> Plain(const std::vector<std::string>& names) {
  std::vector<std::string> result;
  for (const std::string& name : names) result.push_back(Plain(name));
  return result;
}

int IndexOf(const std::vector<std::string>& names, const std::string& name) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return static_cast<int>(i);
  }
  return -1;
}

// Takes over what PD_BUILD_OP was told.
void Describe(const paddle::OpMetaInfo& info, DirectOp* op) {
  using Helper = paddle::OpMetaInfoHelper;
  op->inputs = Plain(Helper::GetInputs(info));
  for (const std::string& name : Helper::GetInputs(info)) {
    op->optional.push_back(name.find(kOptionalMark) != std::string::npos);
  }
  op->attrs = Helper::GetAttrs(info);
  op->outputs = Plain(Helper::GetOutputs(info));
  op->output_inputs.assign(op->outputs.size(), -1);
  for (const auto& [input, output] : Helper::GetInplaceMap(info)) {
    const int index = IndexOf(op->outputs, Plain(output));
    if (index >= 0) op->output_inputs[index] = IndexOf(op->inputs, Plain(input));
  }
}

}  // namespace

std::vector<DirectOp>& DirectOps() {
  static std::vector<DirectOp> ops;
  return ops;
}

StepArrivals*& CurrentStep() {
  thread_local StepArrivals* current = nullptr;
  return current;
}

namespace {

void CheckArguments(const DirectOp& op, Tensor* const* inputs, const DirectAttr* attrs) {
  struct Scope {
    Scope() { checking_arguments = true; }
    ~Scope() { checking_arguments = false; }
  } scope;
  std::vector<Tensor> results;
  try {
    op.run(inputs, attrs, &results);
  } catch (const ArgumentsAreRight&) {
  }
}

}  // namespace

}  // namespace fastattn::api

// Asked for after the library was loaded, when all operators have been built.
extern "C" __attribute__((visibility("default"))) const fastattn::api::DirectTable*
fastattn_direct_table() {
  using namespace fastattn::api;
  static const DirectTable table = [] {
    const auto& built = paddle::OpMetaInfoMap::Instance().GetMap();
    for (DirectOp& op : DirectOps()) {
      const auto found = built.find(op.name);
      if (found != built.end()) Describe(found->second.front(), &op);
    }
    return DirectTable{kDirectVersion, sizeof(Tensor), &DirectOps(), &CurrentStep, &CheckArguments};
  }();
  return &table;
}
