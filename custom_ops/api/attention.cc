#include <string>
#include <vector>

#include "api/attention_arguments.h"
#include "api/attention_results.h"
#include "api/attention_run.h"
#include "api/key_transform.h"
#include "api/operator.h"
#include "api/paged_cache.h"

namespace fastattn::api {

namespace {

Results FlashResults(const Known& in) { return AttentionResults(in, in["v"].shape); }

}  // namespace

FASTATTN_OPERATOR(Outputs, kFlash, FlashAttention, FlashResults,
                  (const Strided<Tensor>& q, const Strided<Tensor>& k, const Strided<Tensor>& v,
                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                   const Strided<OptionalTensor>& q_descale,
                   const Strided<OptionalTensor>& k_descale,
                   const Strided<OptionalTensor>& v_descale, const OptionalTensor& sinks,
                   const OptionalTensor& mask_offsets, const OptionalTensor& out_scale,
                   OptionalTensor& out, int64_t max_seqlen_q, int64_t max_seqlen_k,
                   float softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                   float softcap, bool return_softmax_lse, const std::string& out_dtype,
                   const std::string& kv_dtype, bool quantize_q)) {
  AttentionParams p;
  ParseQuery(kFlash, q, &p);
  const auto place = q.numel() > 0 ? q.place() : cu_seqlens_q.place();
  p.seqs.num_tokens = static_cast<int>(q.shape()[0]);
  ParseRaggedKv(k, v, cu_seqlens_q, cu_seqlens_k, Get(k_descale), Get(v_descale), kv_dtype, place,
                &p);
  AttentionArgs args;
  args.q_descale = Get(q_descale);
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
  args.quantize_q = quantize_q;
  ParseCommon(kFlash, args, place, &p);
  if (args.out != nullptr) {
    RequireApartFromQueries(kFlash, *args.out, q, p);
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

FASTATTN_OPERATOR(
    Outputs, kPaged, PagedAttention, PagedResults,
    (const Strided<Tensor>& q, const Strided<Tensor>& key_cache, const Strided<Tensor>& value_cache,
     const Tensor& block_tables, const Tensor& cu_seqlens_q, const Tensor& seq_lens_decoder,
     const Tensor& seq_lens_this_time, const Strided<OptionalTensor>& cache_k_scales,
     const Strided<OptionalTensor>& cache_v_scales, const Strided<OptionalTensor>& q_descale,
     const OptionalTensor& sinks, const OptionalTensor& mask_offsets,
     const OptionalTensor& out_scale, OptionalTensor& out, const OptionalTensor& k_center,
     const OptionalTensor& tree_mask, const OptionalTensor& head_windows, int64_t max_seqlen_q,
     int64_t max_seqlen_k, float softmax_scale, bool causal, int64_t window_left,
     int64_t window_right, float softcap, bool return_softmax_lse, const std::string& out_dtype,
     const std::string& cache_quant_type, const std::string& fp8_format, bool quantize_q,
     bool batch_invariant, const std::string& k_rotation, bool split_invariant)) {
  AttentionParams p;
  p.batch_invariant = batch_invariant;
  p.split_invariant = split_invariant;
  ParseQuery(kPaged, q, &p);
  const auto place = q.numel() > 0 ? q.place() : block_tables.place();
  p.paged = true;
  p.cache = ParsePagedCache(
      kPaged,
      {key_cache, value_cache, Get(cache_k_scales), Get(cache_v_scales), cache_quant_type,
       fp8_format, CacheLayout::kFastattn, &block_tables, HeadDimOf(q)},
      place);
  CheckHeads(kPaged, "key_cache", p.cache.num_kv_heads, p.cache.head_dim, &p);
  if (p.cache.type == CacheType::kNone && p.q_dtype != p.cache.dtype) {
    Fail("TypeError", kPaged, "q", "expected dtype ", NameOf(p.cache.dtype),
         " as the cache has, got ", q.dtype());
  }
  p.seqs = ParseSeqs(kPaged, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                     nullptr, q.shape()[0], place, p.num_kv_heads);
  ParseHoles(Get(tree_mask), Get(head_windows), place, &p);
  AttentionArgs args;
  args.q_descale = Get(q_descale);
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
  args.quantize_q = quantize_q;
  args.transform = ParseKeyTransform(kPaged, Get(k_center), k_rotation, p.cache, place);
  ParseCommon(kPaged, args, place, &p);
  if (args.out != nullptr) {
    RequireApartFromQueries(kPaged, *args.out, q, p);
    RequireApart(kPaged, "out", *args.out,
                 {{"key_cache", &key_cache},
                  {"value_cache", &value_cache},
                  {"cache_k_scales", Get(cache_k_scales)},
                  {"cache_v_scales", Get(cache_v_scales)},
                  {"block_tables", &block_tables},
                  {"cu_seqlens_q", &cu_seqlens_q},
                  {"seq_lens_decoder", &seq_lens_decoder},
                  {"seq_lens_this_time", &seq_lens_this_time},
                  {"k_center", Get(k_center)},
                  {"tree_mask", Get(tree_mask)},
                  {"head_windows", Get(head_windows)}});
  }
  return RunAttention(kPaged, args, place, &p);
}

}  // namespace fastattn::api
