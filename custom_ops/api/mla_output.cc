#include "cpu/mla_output.h"

#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/rotation.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mla/output/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "inverse_rope_quantize_fp8";

int64_t Padded(int64_t tokens) {
  return (tokens + kMlaScaleTokens - 1) / kMlaScaleTokens * kMlaScaleTokens;
}

// [T, H, 512] of x to the shapes of codes and scales; -1 is unknown.
std::vector<Shape> OutputShapes(const Shape& x, int num_groups) {
  if (x.size() != 3) Fail("ValueError", kOp, "x", "expected 3 dimensions, got ", ShapeText(x));
  const int64_t tokens = x[0], heads = x[1];
  if (num_groups <= 0 || (heads >= 0 && heads % num_groups != 0)) {
    Fail("ValueError", kOp, "num_groups", "expected a divisor of the ", heads, " heads, got ",
         num_groups);
  }
  const int64_t own = heads < 0 ? -1 : heads / num_groups;
  return {{num_groups, tokens, own < 0 ? -1 : own * kMlaOutputDim},
          {num_groups, own < 0 ? -1 : own * kMlaOutputBlocks, tokens < 0 ? -1 : Padded(tokens)}};
}

Results InverseRopeResults(const Known& in) {
  const Shape unknown = {-1, -1, -1};
  const std::vector<Shape> shapes = Inferred<std::vector<Shape>>({unknown, unknown}, [&] {
    return OutputShapes(in["x"].shape, static_cast<int>(in.Integer("num_groups")));
  });
  return {{"codes", shapes[0], phi::DataType::UINT8},
          {"scales", shapes[1], phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, InverseRopeQuantizeFp8, InverseRopeResults,
                  (const Strided<Tensor>& x, const Tensor& positions, const Tensor& cos_sin_cache,
                   int num_groups)) {
  CheckCosSin(kOp, cos_sin_cache);
  const phi::Place place = cos_sin_cache.place();
  Arg(kOp, "x", x)
      .On(place)
      .Dtype({phi::DataType::BFLOAT16})
      .Dims({-1, -1, kMlaOutputDim})
      .LastDimContiguous();
  RequireAligned(kOp, "x", x, kVectorBytes);
  const Shape shape = x.shape();
  RequireFits(kOp, "x", shape[1]);
  RequireFits(kOp, "x", CheckedProduct(kOp, "x", {shape[1], kMlaOutputBlocks}));
  const std::vector<Shape> shapes = OutputShapes(shape, num_groups);

  InverseRopeParams p;
  p.rotations = ToRotations(kOp, positions, cos_sin_cache, shape[0]);
  Tensor codes = paddle::empty(shapes[0], phi::DataType::UINT8, place);
  Tensor scales = paddle::empty(shapes[1], phi::DataType::FLOAT32, place);
  const Sizes strides = StridesOf(x);
  p.x = Data<uint16_t>(x);
  p.codes = MutableData<uint8_t>(codes);
  p.scales = MutableData<float>(scales);
  p.num_tokens = shape[0];
  p.padded_tokens = shapes[1][2];
  p.token_stride = strides[0];
  p.head_stride = strides[1];
  p.num_heads = static_cast<int>(shape[1]);
  p.group_heads = p.num_heads / num_groups;
  if (x.numel() == 0) return {codes, scales};

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cos_sin_cache)) {
    LaunchOnGpu(kOp, cos_sin_cache,
                [&](cudaStream_t stream) { return cuda::LaunchInverseRopeQuantizeFp8(p, stream); });
    return {codes, scales};
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::InverseRopeQuantizeFp8(p); });
  return {codes, scales};
}

}  // namespace fastattn::api
