#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "common/fp4.h"
#include "cpu/mxfp4.h"
#include "params/mxfp4.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mxfp4/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kQuantize = "mxfp4_quantize";
constexpr const char* kDequantize = "mxfp4_dequantize";

// The last dimension times `numerator` / `denominator`; -1 stays unknown.
Shape WithLast(const char* op, Shape shape, int64_t numerator, int64_t denominator) {
  if (!shape.empty() && shape.back() >= 0) {
    shape.back() =
        CheckedProduct(op, numerator == 1 ? "x" : "codes", {shape.back(), numerator}) / denominator;
  }
  return shape;
}

void CheckColumns(const char* op, const char* arg, const Shape& shape, int64_t multiple) {
  if (shape.empty() || shape.back() % multiple != 0) {
    Fail("ValueError", op, arg, "expected a last dimension that is a multiple of ", multiple,
         ", got shape ", ShapeText(shape));
  }
}

phi::DataType ParseDtype(const std::string& name) {
  if (name == "float32") return phi::DataType::FLOAT32;
  if (name == "float16") return phi::DataType::FLOAT16;
  if (name == "bfloat16") return phi::DataType::BFLOAT16;
  Fail("ValueError", kDequantize, "dtype", "expected float32, float16 or bfloat16, got '", name,
       "'");
}

Results QuantizeResults(const Known& in) {
  const Shape& x = in["x"].shape;
  return {{"codes", WithLast(kQuantize, x, 1, 2), phi::DataType::UINT8},
          {"scales", WithLast(kQuantize, x, 1, kMxBlock), phi::DataType::UINT8}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kQuantize, Mxfp4Quantize, QuantizeResults, (const Tensor& x)) {
  Arg(kQuantize, "x", x)
      .Dtype({phi::DataType::FLOAT32, phi::DataType::FLOAT16, phi::DataType::BFLOAT16})
      .Contiguous();
  const Shape shape = x.shape();
  CheckColumns(kQuantize, "x", shape, kMxBlock);

  Tensor codes = paddle::empty(WithLast(kQuantize, shape, 1, 2), phi::DataType::UINT8, x.place());
  Tensor scales =
      paddle::empty(WithLast(kQuantize, shape, 1, kMxBlock), phi::DataType::UINT8, x.place());
  Mxfp4QuantizeParams p;
  p.dtype = ToDType(kQuantize, "x", x.dtype());
  p.cols = shape.back();
  p.rows = p.cols == 0 ? 0 : x.numel() / p.cols;
  p.x_row_stride = p.cols;
  p.x = Data(x);
  p.codes = MutableData<uint8_t>(codes);
  p.scales = MutableData<uint8_t>(scales);
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(x)) {
    LaunchOnGpu(kQuantize, x,
                [&](cudaStream_t stream) { return cuda::LaunchMxfp4Quantize(p, stream); });
    return {codes, scales};
  }
#endif
  RequireCpu(kQuantize, x.place());
  Guarded(kQuantize, [&] { cpu::Mxfp4Quantize(p); });
  return {codes, scales};
}

namespace {

Results DequantizeResults(const Known& in) {
  const Shape& codes = in["codes"].shape;
  const auto dtype = [&] { return ParseDtype(in.Text("dtype")); };
  return {{"x", Inferred(codes, [&] { return WithLast(kDequantize, codes, 2, 1); }),
           Inferred(phi::DataType::FLOAT32, dtype)}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kDequantize, Mxfp4Dequantize, DequantizeResults,
                  (const Tensor& codes, const Tensor& scales, const std::string& dtype)) {
  Arg(kDequantize, "codes", codes).Dtype({phi::DataType::UINT8}).Contiguous();
  const Shape shape = codes.shape();
  CheckColumns(kDequantize, "codes", shape, kMxBlock / 2);
  Arg(kDequantize, "scales", scales)
      .On(codes.place())
      .Dtype({phi::DataType::UINT8})
      .Dims(WithLast(kDequantize, shape, 2, kMxBlock))
      .Contiguous();
  const phi::DataType out_dtype = ParseDtype(dtype);

  Tensor x = paddle::empty(WithLast(kDequantize, shape, 2, 1), out_dtype, codes.place());
  Mxfp4DequantizeParams p;
  p.dtype = ToDType(kDequantize, "dtype", out_dtype);
  p.cols = 2 * shape.back();
  p.rows = shape.back() == 0 ? 0 : codes.numel() / shape.back();
  p.codes = Data<uint8_t>(codes);
  p.scales = Data<uint8_t>(scales);
  p.x = MutableData(x);
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(codes)) {
    LaunchOnGpu(kDequantize, codes,
                [&](cudaStream_t stream) { return cuda::LaunchMxfp4Dequantize(p, stream); });
    return {x};
  }
#endif
  RequireCpu(kDequantize, codes.place());
  Guarded(kDequantize, [&] { cpu::Mxfp4Dequantize(p); });
  return {x};
}

}  // namespace fastattn::api
