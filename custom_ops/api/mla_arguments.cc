#include "api/mla_arguments.h"

namespace fastattn::api {

int ParseMlaHeads(const char* op, const Sizes& q_shape) {
  constexpr int64_t kMaxHeads = 128;
  if (q_shape[1] < 1 || q_shape[1] > kMaxHeads) {
    Fail("NotImplementedError", op, "q", "expected 1 to ", kMaxHeads, " heads, got shape ",
         ShapeText(q_shape));
  }
  return static_cast<int>(q_shape[1]);
}

const float* ParseMlaSinks(const char* op, const Tensor* sinks, int heads,
                           const phi::Place& place) {
  if (sinks == nullptr) return nullptr;
  Arg(op, "sinks", *sinks).On(place).Dtype({phi::DataType::FLOAT32}).Dims({heads}).Contiguous();
  return Data<float>(*sinks);
}

phi::DataType MlaOutDtype(const std::string& out_dtype) {
  return out_dtype == "float32" ? phi::DataType::FLOAT32 : phi::DataType::BFLOAT16;
}

Tensor ParseMlaOut(const char* op, const Tensor* given, const std::string& out_dtype, Sizes shape,
                   const phi::Place& place, std::initializer_list<NamedTensor> inputs,
                   uint16_t** out, float** out_float) {
  if (out_dtype != "bfloat16" && out_dtype != "float32") {
    Fail("ValueError", op, "out_dtype", "expected bfloat16 or float32, got '", out_dtype, "'");
  }
  const phi::DataType dtype = MlaOutDtype(out_dtype);
  if (given != nullptr) {
    Arg(op, "out", *given).On(place).Dtype({dtype}).Dims(shape).Contiguous();
    RequireAlignedAddress(op, "out", *given, kVectorBytes);
    RequireApart(op, "out", *given, inputs);
  }
  Tensor result = given != nullptr ? *given : paddle::empty(shape.ToVector(), dtype, place);
  if (dtype == phi::DataType::FLOAT32) {
    *out_float = MutableData<float>(result);
  } else {
    *out = MutableData<uint16_t>(result);
  }
  return result;
}

}  // namespace fastattn::api
