#include <algorithm>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/rope_args.h"
#include "cpu/gqa_rope.h"
#include "params/gqa_rope.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/compat/gqa_rope/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "gqa_rope_write_cache";

// Refuses the cache types that FastDeploy does not have.
CacheType CheckType(const std::string& cache_quant_type) {
  const CacheType type = ParseCacheType(kOp, cache_quant_type);
  if (!FormatOf(type).in_fastdeploy) {
    Fail("NotImplementedError", kOp, "cache_quant_type", "FastDeploy has no '", NameOf(type),
         "'; supported: ",
         CacheTypeNames([](const CacheFormat& format) { return format.in_fastdeploy; }));
  }
  return type;
}

// Rotated channels of a head. FastDeploy tells them by the table's columns: D / 2 (or, for neox, D)
// for the whole head, else half of it is rotated.
int RotaryDim(const Tensor& table, int head_dim) {
  const int64_t columns = table.shape().empty() ? 0 : table.shape().back();
  return columns == head_dim || columns == head_dim / 2 ? head_dim : head_dim / 2;
}

int HeadsOf(const Tensor& qkv, const PagedCache& cache) {
  Arg(kOp, "qkv", qkv).Rank(2);
  const int64_t heads = qkv.shape()[1] / cache.head_dim - 2LL * cache.num_kv_heads;
  if (heads < 1 || qkv.shape()[1] % cache.head_dim != 0) {
    Fail("ValueError", kOp, "qkv", "expected shape [T, (H + 2 * ", cache.num_kv_heads, ") * ",
         cache.head_dim, "] (the KV heads and head_dim of key_cache), got ",
         ShapeText(qkv.shape()));
  }
  RequireFits(kOp, "qkv", heads);
  return static_cast<int>(heads);
}

Results GqaResults(const Known& in) {
  const KnownInput &qkv = in["qkv"], &keys = in["key_cache"];
  const int64_t channels = qkv.size(1), kv_heads = keys.size(1), head_dim = keys.size(3);
  const bool known = channels >= 0 && kv_heads >= 0 && head_dim > 0;
  const int64_t heads = known ? channels / head_dim - 2 * kv_heads : -1;
  const Shape kv = {in.Integer("kv_token_num"), kv_heads, head_dim};
  return {{"q", {qkv.size(0), std::max<int64_t>(heads, -1), head_dim}, qkv.dtype},
          {"k", kv, qkv.dtype},
          {"v", kv, qkv.dtype},
          {"qkv_out", qkv.shape, qkv.dtype}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, GqaRopeWriteCache, GqaResults,
                  (const Strided<Tensor>& qkv, Tensor& key_cache, Tensor& value_cache,
                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                   const Tensor& rotary_embs, const Tensor& seq_lens_this_time,
                   const Tensor& seq_lens_encoder, const Tensor& seq_lens_decoder,
                   const Tensor& block_tables, const OptionalTensor& batch_id_per_token,
                   const OptionalTensor& q_norm_weight, const OptionalTensor& k_norm_weight,
                   OptionalTensor& cache_k_scales, OptionalTensor& cache_v_scales,
                   int64_t kv_token_num, float rms_norm_eps, bool use_neox_rotary_style,
                   const std::string& cache_quant_type)) {
  CheckType(cache_quant_type);
  Arg(kOp, "qkv", qkv);
  const phi::Place place =
      key_cache.defined() && key_cache.initialized() ? key_cache.place() : qkv.place();
  const std::string e4m3 = "e4m3";
  GqaRopeWriteCacheParams p;
  RopeWriteCacheParams& rope = p.rope;
  const CacheArgs cache{key_cache,        value_cache, Get(cache_k_scales),     Get(cache_v_scales),
                        cache_quant_type, e4m3,        CacheLayout::kFastDeploy};
  rope.cache = ParsePagedCache(kOp, cache, place);
  RequireEqualDims(kOp, rope.cache);
  RequireAligned(kOp, "key_cache", key_cache, kVectorBytes);
  RequireAligned(kOp, "value_cache", value_cache, kVectorBytes);
  const int kv_heads = rope.cache.num_kv_heads, head_dim = rope.cache.head_dim;
  ParseQkv(kOp, qkv, HeadsOf(qkv, rope.cache), kv_heads, rope);
  Arg(kOp, "qkv", qkv).On(place).Contiguous();
  RequireAligned(kOp, "qkv", qkv, kVectorBytes);
  const int64_t num_tokens = qkv.shape()[0];
  rope.seqs = ParseSeqs(kOp, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                        Get(batch_id_per_token), num_tokens, place);
  p.seq_lens_encoder =
      ParseLengths(kOp, "seq_lens_encoder", seq_lens_encoder, block_tables.shape()[0], place);
  p.cu_seqlens_k = ParseLengths(kOp, "cu_seqlens_k", cu_seqlens_k, rope.seqs.batch + 1LL, place);
  Arg(kOp, "rotary_embs", rotary_embs);
  ParseRotary(kOp, &rotary_embs, use_neox_rotary_style, RotaryDim(rotary_embs, head_dim), place,
              rope);
  rope.q_norm_weight =
      ParseVector(kOp, "q_norm_weight", Get(q_norm_weight), head_dim, place, rope.q_norm_dtype);
  rope.k_norm_weight =
      ParseVector(kOp, "k_norm_weight", Get(k_norm_weight), head_dim, place, rope.k_norm_dtype);
  rope.rms_norm_eps = ParseEps(kOp, rms_norm_eps);
  RequireCacheApart(kOp, cache, rope.cache.type,
                    {{"qkv", &qkv},
                     {"cu_seqlens_q", &cu_seqlens_q},
                     {"cu_seqlens_k", &cu_seqlens_k},
                     {"rotary_embs", &rotary_embs},
                     {"seq_lens_this_time", &seq_lens_this_time},
                     {"seq_lens_encoder", &seq_lens_encoder},
                     {"seq_lens_decoder", &seq_lens_decoder},
                     {"block_tables", &block_tables},
                     {"batch_id_per_token", Get(batch_id_per_token)},
                     {"q_norm_weight", Get(q_norm_weight)},
                     {"k_norm_weight", Get(k_norm_weight)}});
  if (kv_token_num < 0) {
    Fail("ValueError", kOp, "kv_token_num", "expected at least 0, got ", kv_token_num);
  }
  CheckedProduct(kOp, "kv_token_num",
                 {kv_token_num, kv_heads, head_dim, int64_t{SizeOf(rope.dtype)}});

  Tensor q = paddle::empty({num_tokens, rope.num_heads, head_dim}, qkv.dtype(), place);
  Tensor key = paddle::empty({kv_token_num, kv_heads, head_dim}, qkv.dtype(), place);
  Tensor value = paddle::empty({kv_token_num, kv_heads, head_dim}, qkv.dtype(), place);
  Tensor qkv_out = paddle::empty(qkv.shape(), qkv.dtype(), place);
  rope.q = MutableData(q);
  p.key = MutableData(key);
  p.value = MutableData(value);
  p.qkv_out = MutableData(qkv_out);
  p.num_kv_tokens = kv_token_num;

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(qkv)) {
    LaunchOnGpu(kOp, qkv,
                [&](cudaStream_t stream) { return cuda::LaunchGqaRopeWriteCache(p, stream); });
    return {q, key, value, qkv_out};
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::GqaRopeWriteCache(p); });
  return {q, key, value, qkv_out};
}

}  // namespace fastattn::api
