#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/key_transform.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "cpu/write_cache.h"
#include "params/cache.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/cache/rope_write/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "write_cache_kv";

// Checks K or V of the new tokens and returns its token stride.
int64_t CheckTokens(const char* name, const Tensor& tensor, const PagedCache& cache, int head_dim,
                    const phi::Place& place) {
  Arg(kOp, name, tensor)
      .On(place)
      .Dtype({phi::DataType::FLOAT32, phi::DataType::FLOAT16, phi::DataType::BFLOAT16})
      .Dims({-1, cache.num_kv_heads, head_dim});
  const int64_t token_stride = HeadsContiguous(kOp, name, tensor);
  RequireAligned(kOp, name, tensor, kVectorBytes);
  return token_stride;
}

}  // namespace

FASTATTN_OPERATOR(void, kOp, WriteCacheKv, NoResults,
                  (const Strided<Tensor>& key, const Strided<Tensor>& value, Tensor& key_cache,
                   Tensor& value_cache, const Tensor& block_tables, const Tensor& cu_seqlens_q,
                   const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
                   OptionalTensor& cache_k_scales, OptionalTensor& cache_v_scales,
                   const OptionalTensor& batch_id_per_token, const OptionalTensor& k_center,
                   const OptionalTensor& k_feedback, const std::string& cache_quant_type,
                   const std::string& fp8_format, const std::string& k_rotation)) {
  Arg(kOp, "key", key);
  Arg(kOp, "key_cache", key_cache);
  const Tensor& anchor = key_cache.initialized() ? key_cache : key;  // empty ones have no place
  const phi::Place place = anchor.place();
  WriteCacheParams p;
  const CacheArgs cache{key_cache,        value_cache, Get(cache_k_scales),    Get(cache_v_scales),
                        cache_quant_type, fp8_format,  CacheLayout::kFastattn, &block_tables,
                        HeadDimOf(key)};
  p.cache = ParsePagedCache(kOp, cache, place);
  RequireAligned(kOp, "key_cache", key_cache, kVectorBytes);
  RequireAligned(kOp, "value_cache", value_cache, kVectorBytes);
  const KeyTransform transform =
      ParseKeyTransform(kOp, Get(k_center), k_rotation, p.cache, place, Get(k_feedback));
  p.key_token_stride = CheckTokens("key", key, p.cache, p.cache.head_dim, place);
  p.value_token_stride = CheckTokens("value", value, p.cache, p.cache.ValueDim(), place);
  Arg(kOp, "value", value)
      .Dtype({key.dtype()})
      .Dims({key.shape()[0], p.cache.num_kv_heads, p.cache.ValueDim()});
  p.dtype = ToDType(kOp, "key", key.dtype());
  if (p.cache.type == CacheType::kNone && p.dtype != DType::kFloat32 && p.dtype != p.cache.dtype) {
    Fail("TypeError", kOp, "key", "expected dtype float32 or the cache's ", NameOf(p.cache.dtype),
         ", got ", NameOf(p.dtype));
  }
  p.seqs = ParseSeqs(kOp, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                     Get(batch_id_per_token), key.shape()[0], place, p.cache.num_kv_heads);
  RequireCacheApart(kOp, cache, p.cache.type,
                    {{"key", &key},
                     {"value", &value},
                     {"block_tables", &block_tables},
                     {"cu_seqlens_q", &cu_seqlens_q},
                     {"seq_lens_decoder", &seq_lens_decoder},
                     {"seq_lens_this_time", &seq_lens_this_time},
                     {"batch_id_per_token", Get(batch_id_per_token)},
                     {"k_center", Get(k_center)},
                     {"k_feedback", Get(k_feedback)}});
  p.key = Data(key);
  p.value = Data(value);

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(anchor)) {
    RequireGridOfTokens(kOp, p.seqs);
    LaunchOnGpu(kOp, anchor,
                [&](cudaStream_t stream) { return cuda::LaunchWriteCache(p, transform, stream); });
    return;
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::WriteCache(p, transform); });
}

}  // namespace fastattn::api
