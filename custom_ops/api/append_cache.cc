#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/key_transform.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "cpu/append_cache.h"
#include "params/cache.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/cache/append/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "append_cache_kv_c8";

void CheckType(const std::string& cache_quant_type, bool dynamic_quant) {
  const CacheType type = ParseCacheType(kOp, cache_quant_type);
  if (!IsQuantized(type)) {
    Fail("NotImplementedError", kOp, "cache_quant_type",
         "'none' stores no codes; supported: ", QuantizedTypeNames());
  }
  if (dynamic_quant != IsDynamic(type)) {
    Fail("ValueError", kOp, "dynamic_quant", "cache_quant_type '", cache_quant_type, "' has ",
         IsDynamic(type) ? "dynamic" : "static", " scales, but dynamic_quant is ",
         dynamic_quant ? "True" : "False");
  }
}

CacheLayout CheckLayout(const std::string& cache_layout) {
  const CacheLayout layout = ParseCacheLayout(kOp, "cache_layout", cache_layout);
  if (layout == CacheLayout::kLogical) {
    Fail("NotImplementedError", kOp, "cache_layout",
         "'logical' is not supported; supported: fastattn, fastdeploy");
  }
  return layout;
}

// Checks an output and returns its token stride.
int64_t CheckOutput(const char* name, const Tensor& tensor, const PagedCache& cache, int head_dim,
                    const phi::Place& place) {
  Arg(kOp, name, tensor)
      .On(place)
      .Dtype({phi::DataType::BFLOAT16, phi::DataType::FLOAT16})
      .Dims({-1, cache.num_kv_heads, head_dim});
  const int64_t token_stride = HeadsContiguous(kOp, name, tensor);
  RequireAligned(kOp, name, tensor, kVectorBytes);
  return token_stride;
}

}  // namespace

FASTATTN_OPERATOR(void, kOp, AppendCacheKvC8, NoResults,
                  (const Strided<Tensor>& key_cache, const Strided<Tensor>& value_cache,
                   Tensor& key, Tensor& value, const Tensor& block_tables,
                   const Tensor& seq_lens_decoder, const Tensor& cu_seqlens_k,
                   const Strided<Tensor>& cache_k_scales, const Strided<Tensor>& cache_v_scales,
                   const OptionalTensor& k_center, bool dynamic_quant,
                   const std::string& cache_quant_type, const std::string& cache_layout,
                   const std::string& fp8_format, const std::string& k_rotation)) {
  CheckType(cache_quant_type, dynamic_quant);
  Arg(kOp, "key_cache", key_cache);
  Arg(kOp, "key", key);
  Arg(kOp, "cache_k_scales", cache_k_scales);
  Arg(kOp, "cache_v_scales", cache_v_scales);
  const Tensor& anchor = key_cache.initialized() ? key_cache : key;  // empty ones have no place
  const phi::Place place = anchor.place();
  AppendCacheParams p;
  p.cache =
      ParsePagedCache(kOp,
                      {key_cache, value_cache, &cache_k_scales, &cache_v_scales, cache_quant_type,
                       fp8_format, CheckLayout(cache_layout), nullptr, HeadDimOf(key)},
                      place);
  RequireAligned(kOp, "key_cache", key_cache, kVectorBytes);
  RequireAligned(kOp, "value_cache", value_cache, kVectorBytes);
  const KeyTransform transform = ParseKeyTransform(kOp, Get(k_center), k_rotation, p.cache, place);
  if (transform.Any() && p.cache.layout != CacheLayout::kFastattn) {
    Fail("NotImplementedError", kOp, "cache_layout", "'", cache_layout,
         "' is not supported with k_rotation or k_center; supported: fastattn");
  }
  p.dynamic_quant = dynamic_quant;
  p.key_token_stride = CheckOutput("key", key, p.cache, p.cache.head_dim, place);
  p.value_token_stride = CheckOutput("value", value, p.cache, p.cache.ValueDim(), place);
  Arg(kOp, "value", value)
      .Dtype({key.dtype()})
      .Dims({key.shape()[0], p.cache.num_kv_heads, p.cache.ValueDim()});
  RequireApart(kOp, "value", value, "key", key);
  p.dtype = ToDType(kOp, "key", key.dtype());
  p.num_out_tokens = key.shape()[0];

  Arg(kOp, "block_tables", block_tables)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Rank(2)
      .Contiguous();
  const Sizes table = SizesOf(block_tables);
  for (int64_t size : table) RequireFits(kOp, "block_tables", size);
  p.batch = static_cast<int>(table[0]);
  p.max_blocks = static_cast<int>(table[1]);
  p.block_tables = Data<int>(block_tables);
  const char* const why = " (block_tables has one row a sequence)";
  p.seq_lens_decoder =
      ParseLengths(kOp, "seq_lens_decoder", seq_lens_decoder, table[0], place, why);
  p.cu_seqlens_k = ParseLengths(kOp, "cu_seqlens_k", cu_seqlens_k, table[0] + 1, place, why);
  for (const Tensor* written : {&key, &value}) {
    RequireNoOverlap(kOp, written == &key ? "key" : "value", *written);
    RequireApart(kOp, written == &key ? "key" : "value", *written,
                 {{"key_cache", &key_cache},
                  {"value_cache", &value_cache},
                  {"cache_k_scales", &cache_k_scales},
                  {"cache_v_scales", &cache_v_scales},
                  {"block_tables", &block_tables},
                  {"seq_lens_decoder", &seq_lens_decoder},
                  {"cu_seqlens_k", &cu_seqlens_k},
                  {"k_center", Get(k_center)}});
  }
  p.key = MutableData(key);
  p.value = MutableData(value);

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(anchor)) {
    LaunchOnGpu(kOp, anchor, [&](cudaStream_t stream) {
      const cudaError_t status = cuda::LaunchAppendCache(p, stream);
      return status != cudaSuccess ? status : cuda::LaunchRestoreKey(p, transform, stream);
    });
    return;
  }
#endif
  RequireCpu(kOp, place);
  Guarded(kOp, [&] { cpu::AppendCache(p, transform); });
}

}  // namespace fastattn::api
