#include "api/direct.h"

namespace fastattn::api {

std::vector<const DirectOp*>& DirectOps() {
  static std::vector<const DirectOp*> ops;
  return ops;
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

// Asked for after the library was loaded, when all operators have been declared.
extern "C" __attribute__((visibility("default"))) const fastattn::api::DirectTable*
fastattn_direct_table() {
  using namespace fastattn::api;
  static const DirectTable table{kDirectVersion, sizeof(Tensor), &DirectOps(), &CheckArguments};
  return &table;
}
