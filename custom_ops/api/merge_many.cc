#include <cmath>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "cpu/merge_many.h"
#include "params/merge_many.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/merge_many/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "merge_many_attn_states";

// How the output is stored: as codes, in the states' dtype, or fp32 states in the 16 bits of a
// given tensor.
MergeOutput OutputKind(DType dtype, bool fp8, const Tensor* output) {
  if (output == nullptr) return fp8 ? MergeOutput::kStaticFp8 : MergeOutput::kPlain;
  const DType given = ToDType(kOp, "output", output->dtype());
  if (fp8) {
    if (given == DType::kUInt8 || given == DType::kE4M3) return MergeOutput::kStaticFp8;
    Fail("TypeError", kOp, "output", "expected dtype uint8 or float8_e4m3fn for FP8, got ",
         output->dtype());
  }
  if (given == dtype) return MergeOutput::kPlain;
  if (dtype == DType::kFloat32 && given == DType::kFloat16) return MergeOutput::kFloat16;
  if (dtype == DType::kFloat32 && given == DType::kBFloat16) return MergeOutput::kBFloat16;
  Fail("TypeError", kOp, "output", "expected dtype ", NameOf(dtype),
       dtype == DType::kFloat32 ? ", float16 or bfloat16" : "", ", got ", output->dtype());
}

Results MergeManyResults(const Known& in) {
  const KnownInput &all = in["outputs"], &output = in["output"];
  const int64_t tokens = all.size(1), heads = all.size(2);
  const phi::DataType dtype = in["output_scale"].given() ? phi::DataType::UINT8 : all.dtype;
  return {{"merged", {tokens, heads, all.size(3)}, output.given() ? output.dtype : dtype},
          {"merged_lse", {heads, tokens}, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, MergeManyAttnStates, MergeManyResults,
                  (const Strided<Tensor>& outputs, const Strided<Tensor>& lses,
                   const OptionalTensor& sinks, const OptionalTensor& output_scale,
                   OptionalTensor& output, bool sinks_in_lse)) {
  Arg(kOp, "outputs", outputs)
      .Dtype({phi::DataType::FLOAT32, phi::DataType::FLOAT16, phi::DataType::BFLOAT16})
      .Rank(4)
      .LastDimContiguous();
  const auto place = outputs.place();
  const Sizes shape = SizesOf(outputs);
  if (shape[0] < 1) Fail("ValueError", kOp, "outputs", "expected at least one state");
  for (size_t i : {0, 2, 3}) RequireFits(kOp, "outputs", shape[i]);
  Arg(kOp, "lses", lses)
      .On(place)
      .Dtype({phi::DataType::FLOAT32})
      .Dims({shape[0], shape[2], shape[1]});
  const Tensor* sink = Get(sinks);
  const Tensor* scale = Get(output_scale);
  const Tensor* given = Get(output);
  if (sink != nullptr) {
    Arg(kOp, "sinks", *sink)
        .On(place)
        .Dtype({phi::DataType::FLOAT32, phi::DataType::BFLOAT16})
        .Dims({shape[2]})
        .Contiguous();
  }
  if (scale != nullptr) {
    Arg(kOp, "output_scale", *scale).On(place).Dtype({phi::DataType::FLOAT32}).Dims({1});
  }
  const Shape result_shape = {shape[1], shape[2], shape[3]};
  if (given != nullptr) {
    Arg(kOp, "output", *given).On(place).Dims(result_shape).LastDimContiguous();
    RequireNoOverlap(kOp, "output", *given);
    RequireApart(
        kOp, "output", *given,
        {{"outputs", &outputs}, {"lses", &lses}, {"sinks", sink}, {"output_scale", scale}});
  }

  MergeManyParams p;
  p.dtype = ToDType(kOp, "outputs", outputs.dtype());
  p.output_kind = OutputKind(p.dtype, scale != nullptr, given);
  p.num_states = static_cast<int>(shape[0]);
  p.num_tokens = shape[1];
  p.num_heads = static_cast<int>(shape[2]);
  p.head_dim = static_cast<int>(shape[3]);
  p.sinks_in_lse = sinks_in_lse;
  Tensor merged =
      given ? *given
            : paddle::empty(result_shape, scale ? phi::DataType::UINT8 : outputs.dtype(), place);
  Tensor merged_lse = paddle::empty({shape[2], shape[1]}, phi::DataType::FLOAT32, place);
  p.outputs = Data(outputs);
  p.lses = Data<float>(lses);
  p.output = MutableData(merged);
  p.output_lse = MutableData<float>(merged_lse);
  if (sink != nullptr) {
    p.sinks = Data(*sink);
    p.sinks_dtype = ToDType(kOp, "sinks", sink->dtype());
  }
  if (scale != nullptr) p.output_scale = Data<float>(*scale);
  const Sizes strides = StridesOf(outputs), lse_strides = StridesOf(lses);
  const Sizes out_strides = StridesOf(merged);
  p.state_stride = strides[0];
  p.token_stride = strides[1];
  p.head_stride = strides[2];
  p.lse_state_stride = lse_strides[0];
  p.lse_head_stride = lse_strides[1];
  p.lse_token_stride = lse_strides[2];
  p.output_token_stride = out_strides[0];
  p.output_head_stride = out_strides[1];

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(outputs)) {
    LaunchOnGpu(kOp, outputs,
                [&](cudaStream_t stream) { return cuda::LaunchMergeManyAttnStates(p, stream); });
    return {merged, merged_lse};
  }
#endif
  RequireCpu(kOp, place);
  // The device's scale is used as it is, but the host can see this one.
  if (p.output_scale != nullptr && !(*p.output_scale > 0.0f && std::isfinite(*p.output_scale))) {
    Fail("ValueError", kOp, "output_scale", "expected a finite positive scale, got ",
         *p.output_scale);
  }
  if (p.num_tokens > 0 && p.num_heads > 0) Guarded(kOp, [&] { cpu::MergeManyAttnStates(p); });
  return {merged, merged_lse};
}

}  // namespace fastattn::api
