#include <string>
#include <vector>

#include "api/attention_arguments.h"
#include "api/attention_run.h"
#include "api/direct.h"
#include "api/key_transform.h"
#include "api/paged_cache.h"
#include "common/head_dims.h"

namespace fastattn::api {

// Optional tensors come as non-const references, and optional shapes and dtypes as plain ones where
// their absence does not matter: for each further optional argument Paddle 2.6 would instantiate
// these calls twice as often, and eight of them take minutes to compile.
std::vector<Tensor> FlashAttention(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                   OptionalTensor& q_descale, OptionalTensor& k_descale,
                                   OptionalTensor& v_descale, OptionalTensor& sinks,
                                   OptionalTensor& mask_offsets, OptionalTensor& out_scale,
                                   OptionalTensor& out, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                   float softmax_scale, bool causal, int64_t window_left,
                                   int64_t window_right, float softcap, bool return_softmax_lse,
                                   const std::string& out_dtype, const std::string& kv_dtype,
                                   bool quantize_q) {
  AttentionParams p;
  ParseQuery(kFlash, q, &p);
  const auto place = q.numel() > 0 ? q.place() : cu_seqlens_q.place();
  p.seqs.num_tokens = static_cast<int>(q.shape()[0]);
  ParseRaggedKv(k, v, cu_seqlens_q, cu_seqlens_k, Get(k_descale), Get(v_descale), kv_dtype, place,
                &p);
  const AttentionArgs args{q,
                           Get(q_descale),
                           Get(sinks),
                           Get(mask_offsets),
                           Get(out_scale),
                           Get(out),
                           out_dtype,
                           softmax_scale,
                           softcap,
                           causal,
                           window_left,
                           window_right,
                           max_seqlen_q,
                           max_seqlen_k,
                           return_softmax_lse,
                           quantize_q,
                           {}};
  ParseCommon(kFlash, args, place, &p);
  if (args.out != nullptr) {
    RequireApart(kFlash, "out", *args.out,
                 {{"k", &k},
                  {"v", &v},
                  {"k_descale", Get(k_descale)},
                  {"v_descale", Get(v_descale)},
                  {"cu_seqlens_q", &cu_seqlens_q},
                  {"cu_seqlens_k", &cu_seqlens_k}});
  }
  return RunAttention(kFlash, args, place, &p);
}

std::vector<Tensor> PagedAttention(
    const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
    const Tensor& cu_seqlens_q, const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
    OptionalTensor& cache_k_scales, OptionalTensor& cache_v_scales, OptionalTensor& q_descale,
    OptionalTensor& sinks, OptionalTensor& mask_offsets, OptionalTensor& out_scale,
    OptionalTensor& out, OptionalTensor& k_center, int64_t max_seqlen_q, int64_t max_seqlen_k,
    float softmax_scale, bool causal, int64_t window_left, int64_t window_right, float softcap,
    bool return_softmax_lse, const std::string& out_dtype, const std::string& cache_quant_type,
    const std::string& fp8_format, bool quantize_q, bool batch_invariant,
    const std::string& k_rotation) {
  AttentionParams p;
  p.batch_invariant = batch_invariant;
  ParseQuery(kPaged, q, &p);
  const auto place = q.numel() > 0 ? q.place() : block_tables.place();
  p.paged = true;
  p.cache = ParsePagedCache(kPaged,
                            {key_cache, value_cache, Get(cache_k_scales), Get(cache_v_scales),
                             cache_quant_type, fp8_format},
                            place);
  CheckHeads(kPaged, "key_cache", p.cache.num_kv_heads, p.cache.head_dim, &p);
  if (p.cache.type == CacheType::kNone && p.q_dtype != p.cache.dtype) {
    Fail("TypeError", kPaged, "q", "expected dtype ", NameOf(p.cache.dtype),
         " as the cache has, got ", q.dtype());
  }
  p.seqs = ParseSeqs(kPaged, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                     nullptr, q.shape()[0], place);
  const AttentionArgs args{q,
                           Get(q_descale),
                           Get(sinks),
                           Get(mask_offsets),
                           Get(out_scale),
                           Get(out),
                           out_dtype,
                           softmax_scale,
                           softcap,
                           causal,
                           window_left,
                           window_right,
                           max_seqlen_q,
                           max_seqlen_k,
                           return_softmax_lse,
                           quantize_q,
                           ParseKeyTransform(kPaged, Get(k_center), k_rotation, p.cache, place)};
  ParseCommon(kPaged, args, place, &p);
  if (args.out != nullptr) {
    RequireApart(kPaged, "out", *args.out,
                 {{"key_cache", &key_cache},
                  {"value_cache", &value_cache},
                  {"cache_k_scales", Get(cache_k_scales)},
                  {"cache_v_scales", Get(cache_v_scales)},
                  {"block_tables", &block_tables},
                  {"cu_seqlens_q", &cu_seqlens_q},
                  {"seq_lens_decoder", &seq_lens_decoder},
                  {"seq_lens_this_time", &seq_lens_this_time},
                  {"k_center", Get(k_center)}});
  }
  return RunAttention(kPaged, args, place, &p);
}

namespace {

using OptionalDtype = paddle::optional<phi::DataType>;

// Of queries, whose heads are those of the output, and values, whose channels are.
std::vector<Shape> ResultShapes(const Shape& q, bool return_softmax_lse, const Shape& v = {}) {
  Shape out = q;
  if (q.size() == 3 && v.size() == 3) out[2] = v[2];
  return {out, return_softmax_lse && q.size() == 3 ? Shape{q[1], q[0]} : Shape{1}};
}

std::vector<phi::DataType> ResultDtypes(const phi::DataType& q, bool has_out_scale,
                                        const OptionalDtype& out, const std::string& out_dtype) {
  phi::DataType dtype = q;
  if (out) {
    dtype = *out;
  } else if (has_out_scale) {
    dtype = phi::DataType::UINT8;
  } else if (out_dtype == "float32") {
    dtype = phi::DataType::FLOAT32;
  } else if (q != phi::DataType::FLOAT32 && q != phi::DataType::FLOAT16) {
    dtype = out_dtype == "float16" ? phi::DataType::FLOAT16 : phi::DataType::BFLOAT16;
  }
  return {dtype, phi::DataType::FLOAT32};
}

}  // namespace

std::vector<Shape> FlashInferShape(
    const Shape& q, const Shape& k, const Shape& v, const Shape& cu_seqlens_q,
    const Shape& cu_seqlens_k, const Shape& q_descale, const Shape& k_descale,
    const Shape& v_descale, const Shape& sinks, const Shape& mask_offsets, const Shape& out_scale,
    const Shape& out, int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& kv_dtype, bool quantize_q) {
  return ResultShapes(q, return_softmax_lse, v);
}

std::vector<phi::DataType> FlashInferDtype(
    const phi::DataType& q, const phi::DataType& k, const phi::DataType& v,
    const phi::DataType& cu_seqlens_q, const phi::DataType& cu_seqlens_k,
    const phi::DataType& q_descale, const phi::DataType& k_descale, const phi::DataType& v_descale,
    const phi::DataType& sinks, const phi::DataType& mask_offsets, const OptionalDtype& out_scale,
    const OptionalDtype& out, int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& kv_dtype, bool quantize_q) {
  return ResultDtypes(q, static_cast<bool>(out_scale), out, out_dtype);
}

std::vector<Shape> PagedInferShape(
    const Shape& q, const Shape& key_cache, const Shape& value_cache, const Shape& block_tables,
    const Shape& cu_seqlens_q, const Shape& seq_lens_decoder, const Shape& seq_lens_this_time,
    const Shape& cache_k_scales, const Shape& cache_v_scales, const Shape& q_descale,
    const Shape& sinks, const Shape& mask_offsets, const Shape& out_scale, const Shape& out,
    const Shape& k_center, int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& cache_quant_type,
    const std::string& fp8_format, bool quantize_q, bool batch_invariant,
    const std::string& k_rotation) {
  Shape v = q;
  if (q.size() == 3 && AttentionHeadDims::Has(q[2])) v[2] = ValueDim(static_cast<int>(q[2]));
  return ResultShapes(q, return_softmax_lse, v);
}

std::vector<phi::DataType> PagedInferDtype(
    const phi::DataType& q, const phi::DataType& key_cache, const phi::DataType& value_cache,
    const phi::DataType& block_tables, const phi::DataType& cu_seqlens_q,
    const phi::DataType& seq_lens_decoder, const phi::DataType& seq_lens_this_time,
    const phi::DataType& cache_k_scales, const phi::DataType& cache_v_scales,
    const phi::DataType& q_descale, const phi::DataType& sinks, const phi::DataType& mask_offsets,
    const OptionalDtype& out_scale, const OptionalDtype& out, const phi::DataType& k_center,
    int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& cache_quant_type,
    const std::string& fp8_format, bool quantize_q, bool batch_invariant,
    const std::string& k_rotation) {
  return ResultDtypes(q, static_cast<bool>(out_scale), out, out_dtype);
}

}  // namespace fastattn::api

PD_BUILD_OP(fastattn_flash_attention)
    .Inputs({"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", paddle::Optional("q_descale"),
             paddle::Optional("k_descale"), paddle::Optional("v_descale"),
             paddle::Optional("sinks"), paddle::Optional("mask_offsets"),
             paddle::Optional("out_scale"), paddle::Optional("out")})
    .Outputs({"result", "softmax_lse", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_seqlen_q: int64_t", "max_seqlen_k: int64_t", "softmax_scale: float",
            "causal: bool", "window_left: int64_t", "window_right: int64_t", "softcap: float",
            "return_softmax_lse: bool", "out_dtype: std::string", "kv_dtype: std::string",
            "quantize_q: bool"})
    .SetKernelFn(PD_KERNEL(fastattn::api::Registered<&fastattn::api::FlashAttention>::Run))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::FlashInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::FlashInferDtype));

PD_BUILD_OP(fastattn_paged_attention)
    .Inputs({"q", "key_cache", "value_cache", "block_tables", "cu_seqlens_q", "seq_lens_decoder",
             "seq_lens_this_time", paddle::Optional("cache_k_scales"),
             paddle::Optional("cache_v_scales"), paddle::Optional("q_descale"),
             paddle::Optional("sinks"), paddle::Optional("mask_offsets"),
             paddle::Optional("out_scale"), paddle::Optional("out"), paddle::Optional("k_center")})
    .Outputs({"result", "softmax_lse", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_seqlen_q: int64_t", "max_seqlen_k: int64_t", "softmax_scale: float",
            "causal: bool", "window_left: int64_t", "window_right: int64_t", "softcap: float",
            "return_softmax_lse: bool", "out_dtype: std::string", "cache_quant_type: std::string",
            "fp8_format: std::string", "quantize_q: bool", "batch_invariant: bool",
            "k_rotation: std::string"})
    .SetKernelFn(PD_KERNEL(fastattn::api::Registered<&fastattn::api::PagedAttention>::Run))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::PagedInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::PagedInferDtype));

namespace fastattn::api {

namespace {

const bool kDirectFlashAttention = AddDirect<&FlashAttention>(
    "fastattn_flash_attention", {"q", "k", "v", "q_descale", "k_descale", "v_descale"});
const bool kDirectPagedAttention = AddDirect<&PagedAttention>(
    "fastattn_paged_attention",
    {"q", "q_descale", "key_cache", "value_cache", "cache_k_scales", "cache_v_scales"});

}  // namespace

}  // namespace fastattn::api
