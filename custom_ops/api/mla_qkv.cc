#include "cpu/mla_qkv.h"

#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/mla_cache.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/rope_args.h"
#include "api/rotation.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mla/cache/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "mla_qkv_norm_rope_write";

MlaFormat ParseFormat(const std::string& name) {
  if (name == NameOf(MlaFormat::kFp8x584)) return MlaFormat::kFp8x584;
  Fail("NotImplementedError", kOp, "cache_format", "'", name,
       "' is not supported; supported: fp8_584");
}

// Heads of the result, given those of q; -1 is unknown.
int64_t OutHeads(int64_t heads, int padded_heads) {
  if (padded_heads == 0) return heads;
  if (padded_heads < heads || padded_heads < 0) {
    Fail("ValueError", kOp, "padded_heads", "expected at least the ", heads, " heads of q, got ",
         padded_heads);
  }
  return padded_heads;
}

const Tensor& CheckHeads(const char* name, const Tensor& tensor, const Sizes& shape,
                         const phi::Place& place) {
  Arg(kOp, name, tensor).On(place).Dtype({phi::DataType::BFLOAT16}).Dims(shape).LastDimContiguous();
  RequireAligned(kOp, name, tensor, kVectorBytes);
  RequireFits(kOp, name, SizesOf(tensor)[1]);
  return tensor;
}

// Whether q is the first heads of out, where each head is read and then written.
bool IsPartOf(const Tensor& q, const Tensor& out) {
  if (q.data() != out.data()) return false;
  const Sizes shape = SizesOf(q), strides = StridesOf(q), others = StridesOf(out);
  return (shape[0] == 1 || strides[0] == others[0]) && (shape[1] == 1 || strides[1] == others[1]);
}

void CheckOut(const Tensor& out, const Tensor& q, int padded_heads, const phi::Place& place) {
  const Sizes shape = SizesOf(q);
  CheckHeads("out", out, {shape[0], -1, kMlaQkvDim}, place);
  const int64_t heads = SizesOf(out)[1];
  if (heads < shape[1] || (padded_heads != 0 && heads != padded_heads)) {
    Fail("ValueError", kOp, "out", "expected ", padded_heads != 0 ? "" : "at least ",
         padded_heads != 0 ? padded_heads : shape[1], " heads, got shape ",
         ShapeText(SizesOf(out)));
  }
  RequireNoOverlap(kOp, "out", out);
  if (q.numel() == 0 || out.numel() == 0 || IsPartOf(q, out)) return;
  RequireSameOrApart(kOp, "out", out, "q", q);
}

Results QkvResults(const Known& in) {
  const KnownInput &q = in["q"], &out = in["out"];
  const int64_t heads = Inferred<int64_t>(
      -1, [&] { return OutHeads(q.size(1), static_cast<int>(in.Integer("padded_heads"))); });
  return {{"q_out", out.given() ? out.shape : Shape{q.size(0), heads, kMlaQkvDim},
           phi::DataType::BFLOAT16}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, MlaQkvNormRopeWrite, QkvResults,
                  (const Strided<Tensor>& q, const Strided<Tensor>& kv, Tensor& cache,
                   const Tensor& slot_mapping, const Tensor& positions, const Tensor& cos_sin_cache,
                   OptionalTensor& out, const std::string& cache_format, int page_size,
                   int padded_heads, float rms_norm_eps)) {
  MlaQkvParams p;
  const MlaFormat format = ParseFormat(cache_format);
  p.rms_norm_eps = ParseEps(kOp, rms_norm_eps);
  CheckCosSin(kOp, cos_sin_cache);
  const phi::Place place = cos_sin_cache.place();
  CheckHeads("q", q, {-1, -1, kMlaQkvDim}, place);
  const Shape shape = q.shape();
  Shape out_shape = {shape[0], OutHeads(shape[1], padded_heads), kMlaQkvDim};
  p.num_tokens = shape[0];
  p.num_heads = static_cast<int>(shape[1]);
  Arg(kOp, "kv", kv)
      .On(place)
      .Dtype({phi::DataType::BFLOAT16})
      .Dims({shape[0], kMlaQkvDim})
      .LastDimContiguous();
  RequireAligned(kOp, "kv", kv, kVectorBytes);
  Arg(kOp, "cache", cache);
  p.cache = ParseMlaCache(kOp, cache, format, page_size, place);
  p.slots = ToIndexArray(kOp, "slot_mapping", slot_mapping, place, -1);
  p.num_slots = slot_mapping.dims()[0];
  if (p.num_slots > p.num_tokens) {
    Fail("ValueError", kOp, "slot_mapping", "expected at most ", p.num_tokens,
         " slots, the tokens of q, got ", p.num_slots);
  }
  p.rotations = ToRotations(kOp, positions, cos_sin_cache, p.num_tokens);
  const Tensor* given = Get(out);
  if (given != nullptr) {
    CheckOut(*given, q, padded_heads, place);
    out_shape[1] = given->dims()[1];
    RequireApart(kOp, "out", *given,
                 {{"kv", &kv},
                  {"slot_mapping", &slot_mapping},
                  {"positions", &positions},
                  {"cos_sin_cache", &cos_sin_cache}});
  }
  RequireNoOverlap(kOp, "cache", cache);
  RequireApart(kOp, "cache", cache,
               {{"q", &q},
                {"kv", &kv},
                {"slot_mapping", &slot_mapping},
                {"positions", &positions},
                {"cos_sin_cache", &cos_sin_cache},
                {"out", given}});
  Tensor result =
      given != nullptr ? *given : paddle::empty(out_shape, phi::DataType::BFLOAT16, place);
  const Sizes strides = StridesOf(q), out_strides = StridesOf(result);
  p.q = Data<uint16_t>(q);
  p.q_token_stride = strides[0];
  p.q_head_stride = strides[1];
  p.q_out = MutableData<uint16_t>(result);
  p.out_token_stride = out_strides[0];
  p.out_head_stride = out_strides[1];
  p.out_heads = static_cast<int>(out_shape[1]);
  p.kv = Data<uint16_t>(kv);
  p.kv_stride = kv.numel() == 0 ? kMlaQkvDim : StridesOf(kv)[0];
  if (p.num_tokens == 0) return {result};

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cos_sin_cache)) {
    LaunchOnGpu(kOp, cos_sin_cache,
                [&](cudaStream_t stream) { return cuda::LaunchMlaQkvNormRopeWrite(p, stream); });
    return {result};
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::MlaQkvNormRopeWrite(p); });
  return {result};
}

}  // namespace fastattn::api
