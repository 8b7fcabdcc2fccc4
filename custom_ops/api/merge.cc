#include <cmath>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "cpu/merge.h"
#include "params/merge.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/merge/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "merge_attn_states";

// The tensor that receives e4m3 codes.
void CheckCodes(const Tensor& output) {
  const DType dtype = ToDType(kOp, "output", output.dtype());
  if (dtype != DType::kUInt8 && dtype != DType::kE4M3) {
    Fail("TypeError", kOp, "output", "expected dtype uint8 or float8_e4m3fn for FP8, got ",
         output.dtype());
  }
}

// How values are stored: in the inputs' dtype, or fp32 ones in the 16 bits of a given tensor.
MergeOutput ValuesKind(DType dtype, const Tensor* output) {
  if (output == nullptr) return MergeOutput::kPlain;
  const DType given = ToDType(kOp, "output", output->dtype());
  if (given == dtype) return MergeOutput::kPlain;
  if (dtype == DType::kFloat32 && given == DType::kFloat16) return MergeOutput::kFloat16;
  if (dtype == DType::kFloat32 && given == DType::kBFloat16) return MergeOutput::kBFloat16;
  Fail("TypeError", kOp, "output", "expected dtype ", NameOf(dtype),
       dtype == DType::kFloat32 ? ", float16 or bfloat16" : "", ", got ", output->dtype());
}

void SetOutputStrides(const Tensor& tensor, int64_t& token, int64_t& head) {
  const Sizes strides = StridesOf(tensor);
  token = strides[0];
  head = strides[1];
}

void SetLseStrides(const Tensor& tensor, int64_t& head, int64_t& token) {
  const Sizes strides = StridesOf(tensor);
  head = strides[0];
  token = strides[1];
}

// Static scale: the device's is used as it is, but the host can see this one.
void CheckScaleValue(const float* scale) {
  if (scale != nullptr && !(*scale > 0.0f && std::isfinite(*scale))) {
    Fail("ValueError", kOp, "output_scale", "expected a finite positive scale, got ", *scale);
  }
}

// Channels that share a scale, from the shape [T, groups] of the scales.
int GroupSize(const Tensor& scales, int64_t tokens, int64_t channels) {
  const Sizes shape = SizesOf(scales);
  const bool fits = shape.size() == 2 && shape[0] == tokens &&
                    (shape[1] == 0 ? channels == 0 : shape[1] > 0 && channels % shape[1] == 0);
  if (!fits) {
    Fail("ValueError", kOp, "output_scales", "expected shape [", tokens, ", groups] where groups ",
         "divides H * D = ", channels, ", got ", ShapeText(shape));
  }
  const int64_t group = shape[1] == 0 ? 1 : channels / shape[1];
  RequireFits(kOp, "output_scales", group);
  return static_cast<int>(group);
}

// The tensors of a call, any of the last four null.
struct Tensors {
  const Tensor &prefix_output, &prefix_lse, &suffix_output, &suffix_lse;
  const Tensor *output_scale, *output, *output_lse, *output_scales;
};

// An output may be written over an input that it is, element for element; whatever else is written
// lies apart.
void CheckApart(const Tensors& t) {
  if (t.output != nullptr) {
    RequireNoOverlap(kOp, "output", *t.output);
    RequireSameOrApart(kOp, "output", *t.output, "prefix_output", t.prefix_output);
    RequireSameOrApart(kOp, "output", *t.output, "suffix_output", t.suffix_output);
    RequireApart(kOp, "output", *t.output,
                 {{"prefix_lse", &t.prefix_lse},
                  {"suffix_lse", &t.suffix_lse},
                  {"output_scale", t.output_scale}});
  }
  if (t.output_lse != nullptr) {
    RequireNoOverlap(kOp, "output_lse", *t.output_lse);
    RequireSameOrApart(kOp, "output_lse", *t.output_lse, "prefix_lse", t.prefix_lse);
    RequireSameOrApart(kOp, "output_lse", *t.output_lse, "suffix_lse", t.suffix_lse);
    RequireApart(kOp, "output_lse", *t.output_lse,
                 {{"prefix_output", &t.prefix_output},
                  {"suffix_output", &t.suffix_output},
                  {"output_scale", t.output_scale},
                  {"output", t.output}});
  }
  if (t.output_scales != nullptr) {
    RequireApart(kOp, "output_scales", *t.output_scales,
                 {{"prefix_output", &t.prefix_output},
                  {"prefix_lse", &t.prefix_lse},
                  {"suffix_output", &t.suffix_output},
                  {"suffix_lse", &t.suffix_lse},
                  {"output", t.output},
                  {"output_lse", t.output_lse}});
  }
}

Results MergeResults(const Known& in) {
  const KnownInput &first = in["prefix_output"], &output = in["output"];
  const bool fp8 = in["output_scale"].given() || in["output_scales"].given();
  const phi::DataType dtype = fp8 ? phi::DataType::UINT8 : first.dtype;
  return {{"merged", first.shape, output.given() ? output.dtype : dtype},
          {"merged_lse", in["prefix_lse"].shape, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, MergeAttnStates, MergeResults,
                  (const Strided<Tensor>& prefix_output, const Strided<Tensor>& prefix_lse,
                   const Strided<Tensor>& suffix_output, const Strided<Tensor>& suffix_lse,
                   const OptionalTensor& output_scale, OptionalTensor& output,
                   OptionalTensor& output_lse, OptionalTensor& output_scales,
                   int64_t prefill_tokens_with_context)) {
  Arg(kOp, "prefix_output", prefix_output)
      .Dtype({phi::DataType::FLOAT32, phi::DataType::FLOAT16, phi::DataType::BFLOAT16})
      .Rank(3)
      .LastDimContiguous();
  const auto place = prefix_output.place();
  const Sizes shape = SizesOf(prefix_output);
  for (size_t i : {1, 2}) RequireFits(kOp, "prefix_output", shape[i]);
  const Shape lse_shape = {shape[1], shape[0]};
  Arg(kOp, "suffix_output", suffix_output)
      .On(place)
      .Dtype({prefix_output.dtype()})
      .Dims(shape)
      .LastDimContiguous();
  Arg(kOp, "prefix_lse", prefix_lse).On(place).Dtype({phi::DataType::FLOAT32}).Dims(lse_shape);
  Arg(kOp, "suffix_lse", suffix_lse).On(place).Dtype({phi::DataType::FLOAT32}).Dims(lse_shape);

  const Tensor* scale = Get(output_scale);
  const Tensor* given_output = Get(output);
  const Tensor* given_lse = Get(output_lse);
  const Tensor* given_scales = Get(output_scales);
  if (scale != nullptr && given_scales != nullptr) {
    Fail("ValueError", kOp, "output_scales", "expected None when output_scale is given");
  }
  const bool fp8 = scale != nullptr || given_scales != nullptr;
  if (scale != nullptr) {
    Arg(kOp, "output_scale", *scale).On(place).Dtype({phi::DataType::FLOAT32}).Dims({1});
  }
  if (given_output != nullptr) {
    Arg(kOp, "output", *given_output).On(place).Dims(shape).LastDimContiguous();
    if (fp8) CheckCodes(*given_output);
  }
  if (given_lse != nullptr) {
    Arg(kOp, "output_lse", *given_lse).On(place).Dtype({phi::DataType::FLOAT32}).Dims(lse_shape);
  }
  if (prefill_tokens_with_context < -1 || prefill_tokens_with_context > shape[0]) {
    Fail("ValueError", kOp, "prefill_tokens_with_context", "expected None or 0 to T = ", shape[0],
         ", got ", prefill_tokens_with_context);
  }

  MergeParams p;
  p.dtype = ToDType(kOp, "prefix_output", prefix_output.dtype());
  p.num_tokens = shape[0];
  p.merged_tokens = prefill_tokens_with_context < 0 ? shape[0] : prefill_tokens_with_context;
  p.num_heads = static_cast<int>(shape[1]);
  p.head_dim = static_cast<int>(shape[2]);
  if (given_scales != nullptr) {
    Arg(kOp, "output_scales", *given_scales).On(place).Dtype({phi::DataType::FLOAT32}).Contiguous();
    p.group_size = GroupSize(*given_scales, shape[0],
                             CheckedProduct(kOp, "prefix_output", {shape[1], shape[2]}));
  }
  CheckApart({prefix_output, prefix_lse, suffix_output, suffix_lse, scale, given_output, given_lse,
              given_scales});

  p.output_scale = scale != nullptr ? Data<float>(*scale) : nullptr;

  const auto out_dtype = fp8 ? phi::DataType::UINT8 : prefix_output.dtype();
  Tensor merged = given_output ? *given_output : paddle::empty(shape.ToVector(), out_dtype, place);
  Tensor merged_lse =
      given_lse ? *given_lse : paddle::empty(lse_shape, phi::DataType::FLOAT32, place);
  p.output_kind = given_scales ? MergeOutput::kDynamicFp8
                  : scale      ? MergeOutput::kStaticFp8
                               : ValuesKind(p.dtype, given_output);
  p.prefix_output = Data(prefix_output);
  p.suffix_output = Data(suffix_output);
  p.prefix_lse = Data<float>(prefix_lse);
  p.suffix_lse = Data<float>(suffix_lse);
  p.output = MutableData(merged);
  p.output_lse = MutableData<float>(merged_lse);
  SetOutputStrides(prefix_output, p.prefix_token_stride, p.prefix_head_stride);
  SetOutputStrides(suffix_output, p.suffix_token_stride, p.suffix_head_stride);
  SetOutputStrides(merged, p.output_token_stride, p.output_head_stride);
  SetLseStrides(prefix_lse, p.prefix_lse_head_stride, p.prefix_lse_token_stride);
  SetLseStrides(suffix_lse, p.suffix_lse_head_stride, p.suffix_lse_token_stride);
  SetLseStrides(merged_lse, p.output_lse_head_stride, p.output_lse_token_stride);
  if (given_scales != nullptr) {
    p.output_scales = MutableData<float>(output_scales.get());
    p.output_scales_token_stride = given_scales->shape()[1];
  }

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(prefix_output)) {
    LaunchOnGpu(kOp, prefix_output,
                [&](cudaStream_t stream) { return cuda::LaunchMergeAttnStates(p, stream); });
    return {merged, merged_lse};
  }
#endif
  RequireCpu(kOp, place);
  CheckScaleValue(p.output_scale);
  Guarded(kOp, [&] { cpu::MergeAttnStates(p); });
  return {merged, merged_lse};
}

}  // namespace fastattn::api
