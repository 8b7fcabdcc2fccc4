#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "cpu/quantize.h"
#include "params/quantize.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/quantize/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "quantize_fp8";

QuantGranularity ParseGranularity(const std::string& name) {
  if (name == "tensor") return QuantGranularity::kTensor;
  if (name == "token") return QuantGranularity::kToken;
  if (name == "group") return QuantGranularity::kGroup;
  Fail("ValueError", kOp, "granularity", "expected tensor, token or group, got '", name, "'");
}

Shape ScaleShape(const Shape& x, bool has_scale, const std::string& granularity, int group_size) {
  const QuantGranularity kind = ParseGranularity(granularity);
  if (has_scale || kind == QuantGranularity::kTensor) return {1};
  if (x.empty()) Fail("ValueError", kOp, "x", "expected at least 1 dimension, got a scalar");
  Shape shape(x.begin(), x.end() - 1);
  if (kind == QuantGranularity::kGroup) {
    if (group_size <= 0 || (x.back() >= 0 && x.back() % group_size != 0)) {
      Fail("ValueError", kOp, "group_size", "expected a divisor of the last dimension ", x.back(),
           ", got ", group_size);
    }
    shape.push_back(x.back() < 0 ? -1 : x.back() / group_size);
  } else {
    shape.push_back(1);
  }
  return shape;
}

// Stride of x seen as [rows, cols]: the leading dimensions must lie evenly, as those of a slice of
// the last dimension do.
int64_t RowStride(const Tensor& x) {
  const Shape shape = x.shape();
  const Sizes strides = StridesOf(x);
  if (shape.size() < 2 || x.numel() == 0) return shape.empty() ? 1 : shape.back();
  int64_t row_stride = -1;  // of the innermost leading dimension that has more than one index
  int64_t expected = -1;
  for (size_t i = shape.size() - 1; i-- > 0;) {
    if (shape[i] == 1) continue;
    if (row_stride < 0) {
      row_stride = strides[i];
    } else if (strides[i] != expected) {
      Fail("ValueError", kOp, "x", "expected evenly spaced rows, got shape ", ShapeText(shape),
           " with strides ", ShapeText(strides));
    }
    expected = strides[i] * shape[i];
  }
  return row_stride < 0 ? shape.back() : row_stride;
}

void CheckOutput(const Tensor& output, const Tensor& x) {
  Arg(kOp, "output", output).On(x.place()).Dims(x.shape()).Contiguous();
  const DType dtype = ToDType(kOp, "output", output.dtype());
  if (dtype != DType::kUInt8 && dtype != DType::kE4M3) {
    Fail("TypeError", kOp, "output", "expected dtype uint8 or float8_e4m3fn, got ", output.dtype());
  }
}

Results QuantizeResults(const Known& in) {
  const KnownInput &x = in["x"], &output = in["output"];
  const Shape scales = Inferred(Shape{1}, [&] {
    const auto group_size = static_cast<int>(in.Integer("group_size"));
    return ScaleShape(x.shape, in["scale"].given(), in.Text("granularity"), group_size);
  });
  return {{"codes", x.shape, output.given() ? output.dtype : phi::DataType::UINT8},
          {"scales", scales, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, QuantizeFp8, QuantizeResults,
                  (const Tensor& x, const OptionalTensor& scale, OptionalTensor& output,
                   const std::string& granularity, int group_size)) {
  Arg(kOp, "x", x)
      .Dtype({phi::DataType::FLOAT32, phi::DataType::FLOAT16, phi::DataType::BFLOAT16})
      .LastDimContiguous();
  const Shape shape = x.shape();
  const Tensor* given = Get(scale);
  const Tensor* given_output = Get(output);
  const Shape scale_shape = ScaleShape(shape, given != nullptr, granularity, group_size);
  if (!given && granularity == "token" && shape.back() == 0 && scale_shape[0] != 0) {
    Fail("ValueError", kOp, "x", "expected rows with elements for granularity token, got shape ",
         ShapeText(shape));
  }
  const int64_t row_stride = RowStride(x);
  if (given) {
    Arg(kOp, "scale", *given).On(x.place()).Dtype({phi::DataType::FLOAT32}).Dims({1});
  }
  if (given_output) {
    CheckOutput(*given_output, x);
    RequireApart(kOp, "output", *given_output, "x", x);
    if (given) RequireApart(kOp, "output", *given_output, "scale", *given);
  }

  Tensor codes =
      given_output ? *given_output : paddle::empty(shape, phi::DataType::UINT8, x.place());
  Tensor scales = given ? *given : paddle::empty(scale_shape, phi::DataType::FLOAT32, x.place());

  QuantizeFp8Params p;
  p.dtype = ToDType(kOp, "x", x.dtype());
  p.granularity = given ? QuantGranularity::kStatic : ParseGranularity(granularity);
  p.cols = shape.empty() ? 1 : shape.back();
  p.rows = p.cols == 0 ? 0 : x.numel() / p.cols;
  p.x_row_stride = row_stride;
  p.codes_row_stride = p.cols;
  p.group_size = group_size;
  p.x = Data(x);
  p.codes = MutableData<uint8_t>(codes);
  p.scales = MutableData<float>(scales);

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(x)) {
    LaunchOnGpu(kOp, x, [&](cudaStream_t stream) { return cuda::LaunchQuantizeFp8(p, stream); });
    return {codes, scales};
  }
#endif
  RequireCpu(kOp, x.place());
  Guarded(kOp, [&] { cpu::QuantizeFp8(p); });
  return {codes, scales};
}

}  // namespace fastattn::api
