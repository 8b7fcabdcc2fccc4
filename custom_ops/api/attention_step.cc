// A layer's step in one operator: rope_write_cache_kv, then paged_attention over what it wrote. One
// plan of the attention decides what the writer prepares for it (attention_run.cc).
#include <string>
#include <utility>
#include <vector>

#include "api/attention_arguments.h"
#include "api/attention_run.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/rope_args.h"
#include "api/rope_write_arguments.h"

namespace fastattn::api {

namespace {

constexpr const char* kStep = "attention_step";

Results StepResults(const Known& in) {
  const KnownInput &qkv = in["qkv"], &out = in["out"];
  const std::string name = in.Text("out_dtype");
  phi::DataType dtype = qkv.dtype;
  if (out.given()) {
    dtype = out.dtype;
  } else if (in["out_scale"].given()) {
    dtype = phi::DataType::UINT8;
  } else if (name == "float32") {
    dtype = phi::DataType::FLOAT32;
  }
  const int64_t tokens = qkv.size(0), heads = in.Integer("num_heads");
  const int64_t head_dim = Inferred<int64_t>(-1, [&] {
    const CacheType type = ParseCacheType(kStep, in.Text("cache_quant_type"));
    return in["key_cache"].size(3) * KeyCodesPerByte(type);
  });
  const bool has_lse = in.Flag("return_softmax_lse");
  return {{"result", {tokens, head_dim < 0 || heads < 1 ? -1 : heads * head_dim}, dtype},
          {"softmax_lse", has_lse ? Shape{heads, tokens} : Shape{1}, phi::DataType::FLOAT32}};
}

// What the attention has to undo of K's transform. Mostly nothing: the writer rotates Q along with
// K, which costs nothing, and a constant that all scores of a query lack changes no output. But an
// LSE or a sink needs the scores of K with its constant: then the attention takes the constant and
// rotates Q itself.
KeyTransform LeftToAttention(const AttentionArgs& args, QQuant q_quant, KeyTransform* writers) {
  KeyTransform transform;
  const bool needs_scores = args.sinks != nullptr || args.return_softmax_lse;
  if (writers->center != nullptr && (needs_scores || args.softcap > 0)) {  // which is refused
    transform.center = writers->center;
    transform.rotation = writers->rotation;
  }
  if (transform.Any() && args.softcap == 0 && q_quant != QQuant::kNone) {
    Fail("NotImplementedError", kStep, "q_quant", "'", NameOf(q_quant), "' is not supported with ",
         "k_center where an LSE is returned or a sink counts; supported: none");
  }
  writers->rotates_q = !transform.Any() && writers->rotation != KeyRotation::kNone;
  return transform;
}

// The attention over the cache that a writer fills, without the address of the queries.
AttentionParams AttentionAfter(const RopeWriteCacheParams& write) {
  AttentionParams p;
  p.paged = true;
  p.cache = write.cache;
  p.seqs = write.seqs;
  p.seqs.batch_id_per_token = nullptr;
  p.num_heads = write.num_heads;
  p.num_kv_heads = write.cache.num_kv_heads;
  p.head_dim = write.cache.head_dim;
  p.q_dtype = write.q_quant == QQuant::kNone ? write.dtype : DType::kE4M3;
  p.q_token_stride = int64_t{p.num_heads} * p.head_dim;
  p.q_head_stride = p.head_dim;
  return p;
}

// Memory of the queries, with which `p` and the writer meet. Codes have scales.
Queries TakeQueries(const phi::Place& place, RopeWriteCacheParams* write, AttentionParams* p) {
  Queries queries = AllocateQueries(place, write);
  p->q = write->q;
  if (write->q_quant == QQuant::kPerTensor) {
    p->q_descale.data = write->q_scale;
  } else if (write->q_quant == QQuant::kPerTokenHead) {
    p->q_descale.data = write->q_descale;
    p->q_descale.token_stride = p->num_heads;
    p->q_descale.head_stride = 1;
    p->q_descale.per_query_head = true;
  }
  return queries;
}

// Neither the caches nor the output may share memory with what is read.
void RequireAllApart(const RopeWriteArgs& write, const AttentionArgs& args, CacheType type) {
  const std::vector<NamedTensor> read = write.Read(
      {{"sinks", args.sinks}, {"mask_offsets", args.mask_offsets}, {"out_scale", args.out_scale}});
  RequireCacheApart(kStep, write.cache, type, read);
  if (args.out == nullptr) return;
  RequireApart(kStep, "out", *args.out,
               {{"key_cache", &write.cache.key_cache},
                {"value_cache", &write.cache.value_cache},
                {"cache_k_scales", write.cache.k_scales},
                {"cache_v_scales", write.cache.v_scales}});
  for (const auto& [name, tensor] : read) RequireApart(kStep, "out", *args.out, name, *tensor);
}

}  // namespace

FASTATTN_OPERATOR(
    Outputs, kStep, AttentionStep, StepResults,
    (const Strided<Tensor>& qkv, Tensor& key_cache, Tensor& value_cache,
     const OptionalTensor& rotary_embs, const Tensor& block_tables, const Tensor& cu_seqlens_q,
     const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
     const OptionalTensor& batch_id_per_token, OptionalTensor& cache_k_scales,
     OptionalTensor& cache_v_scales, const OptionalTensor& mask_offsets,
     const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
     const OptionalTensor& qkv_bias, const OptionalTensor& q_scale, const OptionalTensor& k_center,
     const OptionalTensor& k_feedback, const OptionalTensor& sinks, const OptionalTensor& out_scale,
     OptionalTensor& out, int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
     int64_t window_left, int64_t window_right, int num_heads, int num_kv_heads, float rms_norm_eps,
     bool use_neox_rotary_style, int rotary_dim, bool qk_norm_before_rope,
     const std::string& q_quant, const std::string& cache_quant_type, const std::string& fp8_format,
     const std::string& k_rotation, float softmax_scale, float softcap, bool return_softmax_lse,
     const std::string& out_dtype, bool batch_invariant, bool split_invariant)) {
  const phi::Place place = PlaceOfStep(kStep, qkv, key_cache);
  RopeWriteArgs write{{key_cache, value_cache, Get(cache_k_scales), Get(cache_v_scales),
                       cache_quant_type, fp8_format, CacheLayout::kFastattn, &block_tables,
                       FusedHeadDim(qkv, num_heads, num_kv_heads)}};
  write.qkv = &qkv;
  write.rotary_embs = Get(rotary_embs);
  write.block_tables = &block_tables;
  write.cu_seqlens_q = &cu_seqlens_q;
  write.seq_lens_decoder = &seq_lens_decoder;
  write.seq_lens_this_time = &seq_lens_this_time;
  write.q_norm_weight = Get(q_norm_weight);
  write.k_norm_weight = Get(k_norm_weight);
  write.qkv_bias = Get(qkv_bias);
  write.q_scale = Get(q_scale);
  write.k_center = Get(k_center);
  write.k_feedback = Get(k_feedback);
  write.batch_id_per_token = Get(batch_id_per_token);
  write.num_heads = num_heads;
  write.num_kv_heads = num_kv_heads;
  write.rms_norm_eps = rms_norm_eps;
  write.use_neox_rotary_style = use_neox_rotary_style;
  write.rotary_dim = rotary_dim;
  write.qk_norm_before_rope = qk_norm_before_rope;
  write.q_quant = q_quant;
  write.k_rotation = k_rotation;
  StepWriter writer;
  RopeWriteCacheParams& params = writer.params;
  writer.transform = ParseRopeWrite(kStep, write, place, &params);

  AttentionArgs args;
  args.sinks = Get(sinks);
  args.mask_offsets = Get(mask_offsets);
  args.out_scale = Get(out_scale);
  args.out = Get(out);
  args.out_dtype = out_dtype;
  args.softmax_scale = softmax_scale;
  args.softcap = softcap;
  args.causal = causal;
  args.window_left = window_left;
  args.window_right = window_right;
  args.max_seqlen_q = max_seqlen_q;
  args.max_seqlen_k = max_seqlen_k;
  args.return_softmax_lse = return_softmax_lse;
  args.flat = true;
  args.transform = LeftToAttention(args, params.q_quant, &writer.transform);
  if (params.q_quant != QQuant::kNone && args.out_scale == nullptr && out_dtype == "auto") {
    args.out_dtype = NameOf(params.dtype);
  }
  AttentionParams p = AttentionAfter(params);
  p.batch_invariant = batch_invariant;
  p.split_invariant = split_invariant;
  ParseCommon(kStep, args, place, &p);
  RequireAllApart(write, args, p.cache.type);
  const Queries queries = TakeQueries(place, &params, &p);
  return RunAttention(kStep, args, place, &p, &writer);
}

}  // namespace fastattn::api
