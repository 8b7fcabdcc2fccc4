#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/key_transform.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/rope_args.h"
#include "api/step_arrivals.h"
#include "cpu/rope_write_cache.h"
#include "params/rope.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/attention/launch.h"
#include "cuda/cache/rope_write/launch.h"
#include "heuristics/attention.h"
#include "heuristics/rope_write.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "rope_write_cache_kv";

QQuant ParseQQuant(const std::string& name) {
  for (QQuant quant : {QQuant::kNone, QQuant::kPerTensor, QQuant::kPerTokenHead}) {
    if (name == NameOf(quant)) return quant;
  }
  Fail("ValueError", kOp, "q_quant", "expected none, per_tensor or per_token_head, got '", name,
       "'");
}

void ParseQScale(const Tensor* q_scale, const phi::Place& place, RopeWriteCacheParams& p) {
  if (p.q_quant == QQuant::kPerTensor) {
    if (q_scale == nullptr) {
      Fail("ValueError", kOp, "q_scale", "q_quant 'per_tensor' needs a scale, got None");
    }
    Arg(kOp, "q_scale", *q_scale).On(place).Dtype({phi::DataType::FLOAT32}).Dims({1});
    p.q_scale = Data<float>(*q_scale);
  } else if (q_scale != nullptr) {
    Fail("ValueError", kOp, "q_scale", "q_quant '", NameOf(p.q_quant), "' takes no scale");
  }
}

KeyTransform ParseTransform(const Tensor* k_center, const Tensor* k_feedback,
                            const std::string& k_rotation, const std::string& q_rotation,
                            const PagedCache& cache, const phi::Place& place) {
  KeyTransform transform = ParseKeyTransform(kOp, k_center, k_rotation, cache, place, k_feedback);
  const KeyRotation rotation = ParseRotation(kOp, "q_rotation", q_rotation);
  transform.rotates_q = rotation != KeyRotation::kNone;
  if (transform.rotates_q && rotation != transform.rotation) {
    Fail("ValueError", kOp, "q_rotation", "expected none or that of K, got '", NameOf(rotation),
         "' with k_rotation '", NameOf(transform.rotation), "'");
  }
  return transform;
}

#if defined(FASTATTN_WITH_CUDA)
// How the step's attention, which comes next, will be planned.
AttentionPlan PlanAhead(const RopeWriteCacheParams& p, const StepArrivals& step, int device,
                        const cuda::DeviceFacts& facts) {
  int clusters = 0;
  CheckCuda(kOp, cuda::CountClusters(device, facts, &clusters));
  AttentionParams ahead;
  ahead.paged = true;
  ahead.seqs = p.seqs;
  ahead.cache = p.cache;
  ahead.num_heads = p.num_heads;
  ahead.num_kv_heads = p.cache.num_kv_heads;
  ahead.head_dim = p.cache.head_dim;
  ahead.max_seqlen_q = step.max_seqlen_q;
  ahead.max_seqlen_k = step.max_seqlen_k;
  return PlanAttention(SizesOfCall(ahead, {facts.major, facts.processors, clusters}));
}

// The decode kernel sets the counters of the step's attention to 0, if this call belongs to a step
// whose attention will count.
void TakeArrivals(const Tensor& qkv, cudaStream_t stream, RopeWriteCacheParams& p) {
  StepArrivals* step = CurrentStep();
  if (step == nullptr || p.seqs.num_tokens == 0 || p.seqs.num_tokens > kMaxPlanSeqs ||
      !UseDecodeKernel(p.seqs.num_tokens, p.seqs.batch)) {
    return;
  }
  const int device = qkv.place().GetDeviceId();
  cuda::DeviceFacts facts;
  CheckCuda(kOp, cuda::GetDeviceFacts(device, &facts));
  if (facts.major < 9) return;  // no clusters, so that a kernel merges in any case
  const AttentionPlan plan = PlanAhead(p, *step, device, facts);
  const bool joins = plan.Joins();
  if (!joins && plan.workspace == 0) return;
  const int64_t count = NumArrivals(int64_t{kAttentionCtasPerSm} * facts.processors);
  LendBuffer(qkv, stream, count, step);
  if (!joins) {
    step->num_counters = 0;  // nothing sets them to 0
    return;
  }
  p.arrivals = MutableData<int>(step->buffer);
  p.num_arrivals = static_cast<int>(count);
}
#endif

Shape DescaleShape(QQuant quant, int64_t num_tokens, int64_t num_heads) {
  return quant == QQuant::kPerTokenHead ? Shape{num_tokens, num_heads} : Shape{1};
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
      Inferred(Shape{1}, [&] { return DescaleShape(ParseQQuant(quant), tokens, heads); });
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
  Arg(kOp, "qkv", qkv);
  const phi::Place place =
      key_cache.defined() && key_cache.initialized() ? key_cache.place() : qkv.place();
  RopeWriteCacheParams p;
  const CacheArgs cache{key_cache,           value_cache,      Get(cache_k_scales),
                        Get(cache_v_scales), cache_quant_type, fp8_format};
  p.cache = ParsePagedCache(kOp, cache, place);
  RequireEqualDims(kOp, p.cache);
  RequireAligned(kOp, "key_cache", key_cache, kVectorBytes);
  RequireAligned(kOp, "value_cache", value_cache, kVectorBytes);
  ParseQkv(kOp, qkv, num_heads, num_kv_heads, p);
  RequireAligned(kOp, "qkv", qkv, kVectorBytes);
  Arg(kOp, "qkv", qkv).On(place);
  const int64_t num_tokens = qkv.shape()[0];
  p.seqs = ParseSeqs(kOp, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                     Get(batch_id_per_token), num_tokens, place);
  ParseRotary(kOp, Get(rotary_embs), use_neox_rotary_style, rotary_dim, place, p);
  const int head_dim = p.cache.head_dim;
  p.bias = ParseVector(kOp, "qkv_bias", Get(qkv_bias), qkv.shape()[1], place, p.bias_dtype);
  p.q_norm_weight =
      ParseVector(kOp, "q_norm_weight", Get(q_norm_weight), head_dim, place, p.q_norm_dtype);
  p.k_norm_weight =
      ParseVector(kOp, "k_norm_weight", Get(k_norm_weight), head_dim, place, p.k_norm_dtype);
  p.norm_before_rope = qk_norm_before_rope;
  p.rms_norm_eps = ParseEps(kOp, rms_norm_eps);
  p.q_quant = ParseQQuant(q_quant);
  ParseQScale(Get(q_scale), place, p);
  const KeyTransform transform =
      ParseTransform(Get(k_center), Get(k_feedback), k_rotation, q_rotation, p.cache, place);
  RequireCacheApart(kOp, cache, p.cache.type,
                    {{"qkv", &qkv},
                     {"rotary_embs", Get(rotary_embs)},
                     {"block_tables", &block_tables},
                     {"cu_seqlens_q", &cu_seqlens_q},
                     {"seq_lens_decoder", &seq_lens_decoder},
                     {"seq_lens_this_time", &seq_lens_this_time},
                     {"q_norm_weight", Get(q_norm_weight)},
                     {"k_norm_weight", Get(k_norm_weight)},
                     {"qkv_bias", Get(qkv_bias)},
                     {"q_scale", Get(q_scale)},
                     {"k_center", Get(k_center)},
                     {"k_feedback", Get(k_feedback)},
                     {"batch_id_per_token", Get(batch_id_per_token)}});

  const auto q_dtype = p.q_quant == QQuant::kNone ? qkv.dtype() : phi::DataType::UINT8;
  Tensor q = paddle::empty({num_tokens, num_heads, head_dim}, q_dtype, place);
  Tensor q_descale;  // undefined unless scales are measured
  if (p.q_quant == QQuant::kPerTokenHead) {
    q_descale = paddle::empty({num_tokens, num_heads}, phi::DataType::FLOAT32, place);
    p.q_descale = MutableData<float>(q_descale);
  }
  p.q = MutableData(q);

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(qkv)) {
    LaunchOnGpu(kOp, qkv, [&](cudaStream_t stream) {
      TakeArrivals(qkv, stream, p);
      return cuda::LaunchRopeWriteCache(p, transform, stream);
    });
    return {q, q_descale};
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::RopeWriteCache(p, transform); });
  return {q, q_descale};
}

}  // namespace fastattn::api
