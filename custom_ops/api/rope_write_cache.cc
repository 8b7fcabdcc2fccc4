#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/key_transform.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/rope_args.h"
#include "api/rope_write_arguments.h"
#include "cpu/rope_write_cache.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/cache/rope_write/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "rope_write_cache_kv";

bool RotatesQ(const std::string& q_rotation, const KeyTransform& transform) {
  const KeyRotation rotation = ParseRotation(kOp, "q_rotation", q_rotation);
  if (rotation == KeyRotation::kNone) return false;
  if (rotation != transform.rotation) {
    Fail("ValueError", kOp, "q_rotation", "expected none or that of K, got '", NameOf(rotation),
         "' with k_rotation '", NameOf(transform.rotation), "'");
  }
  return true;
}

Results RopeResults(const Known& in) {
  const KnownInput& qkv = in["qkv"];
  const int64_t tokens = qkv.size(0), heads = in.Integer("num_heads");
  const std::string quant = in.Text("q_quant");
  const int64_t head_dim = Inferred<int64_t>(-1, [&] {
    const CacheType type = ParseCacheType(kOp, in.Text("cache_quant_type"));
    return in["key_cache"].size(3) * KeyCodesPerByte(type);
  });
  const Shape descale =
      Inferred(Shape{1}, [&] { return QDescaleShape(ParseQQuant(kOp, quant), tokens, heads); });
  const bool keeps = quant == NameOf(QQuant::kNone);
  return {{"q", {tokens, heads, head_dim}, keeps ? qkv.dtype : phi::DataType::UINT8},
          {"q_descale", descale, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, RopeWriteCacheKv, RopeResults,
                  (const Strided<Tensor>& qkv, Tensor& key_cache, Tensor& value_cache,
                   const OptionalTensor& rotary_embs, const Tensor& block_tables,
                   const Tensor& cu_seqlens_q, const Tensor& seq_lens_decoder,
                   const Tensor& seq_lens_this_time, const OptionalTensor& q_norm_weight,
                   const OptionalTensor& k_norm_weight, const OptionalTensor& qkv_bias,
                   const OptionalTensor& q_scale, const OptionalTensor& k_center,
                   const OptionalTensor& k_feedback, OptionalTensor& cache_k_scales,
                   OptionalTensor& cache_v_scales, const OptionalTensor& batch_id_per_token,
                   int num_heads, int num_kv_heads, float rms_norm_eps, bool use_neox_rotary_style,
                   int rotary_dim, bool qk_norm_before_rope, const std::string& q_quant,
                   const std::string& cache_quant_type, const std::string& fp8_format,
                   const std::string& k_rotation, const std::string& q_rotation)) {
  const phi::Place place = PlaceOfStep(kOp, qkv, key_cache);
  RopeWriteArgs args{{key_cache, value_cache, Get(cache_k_scales), Get(cache_v_scales),
                      cache_quant_type, fp8_format, CacheLayout::kFastattn, &block_tables,
                      FusedHeadDim(qkv, num_heads, num_kv_heads)}};
  args.qkv = &qkv;
  args.rotary_embs = Get(rotary_embs);
  args.block_tables = &block_tables;
  args.cu_seqlens_q = &cu_seqlens_q;
  args.seq_lens_decoder = &seq_lens_decoder;
  args.seq_lens_this_time = &seq_lens_this_time;
  args.q_norm_weight = Get(q_norm_weight);
  args.k_norm_weight = Get(k_norm_weight);
  args.qkv_bias = Get(qkv_bias);
  args.q_scale = Get(q_scale);
  args.k_center = Get(k_center);
  args.k_feedback = Get(k_feedback);
  args.batch_id_per_token = Get(batch_id_per_token);
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.rms_norm_eps = rms_norm_eps;
  args.use_neox_rotary_style = use_neox_rotary_style;
  args.rotary_dim = rotary_dim;
  args.qk_norm_before_rope = qk_norm_before_rope;
  args.q_quant = q_quant;
  args.k_rotation = k_rotation;
  RopeWriteCacheParams p;
  KeyTransform transform = ParseRopeWrite(kOp, args, place, &p);
  transform.rotates_q = RotatesQ(q_rotation, transform);
  RequireCacheApart(kOp, args.cache, p.cache.type, args.Read());

  const Queries queries = AllocateQueries(place, &p);
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(qkv)) {
    RequireGridOfTokens(kOp, p.seqs);
    LaunchOnGpu(kOp, qkv, [&](cudaStream_t stream) {
      return cuda::LaunchRopeWriteCache(p, transform, stream);
    });
    return {queries.q, queries.q_descale};
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::RopeWriteCache(p, transform); });
  return {queries.q, queries.q_descale};
}

}  // namespace fastattn::api
