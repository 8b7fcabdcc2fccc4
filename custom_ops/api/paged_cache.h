// Parsing and checking of the cache and sequence arguments that most operators take.
#pragma once

#include <string>
#include <vector>

#include "api/check.h"
#include "params/common.h"

namespace fastattn::api {

// Refuses a dimension that does not fit into an int.
void RequireFits(const char* op, const char* name, int64_t size);

// Names of the cache types of which holds(format) is true, as error messages list them.
template <typename Predicate>
std::string CacheTypeNames(Predicate holds) {
  std::string names;
  for (const CacheFormat& format : kCacheFormats) {
    if (holds(format)) names += (names.empty() ? "" : ", ") + std::string(format.name);
  }
  return names;
}

inline std::string QuantizedTypeNames() {
  return CacheTypeNames([](const CacheFormat& format) { return IsQuantized(format.type); });
}

CacheType ParseCacheType(const char* op, const std::string& name);
Fp8Format ParseFp8Format(const char* op, const std::string& name);
CacheLayout ParseCacheLayout(const char* op, const char* arg, const std::string& name);

// The cache tensors of a layer as the operators receive them.
struct CacheArgs {
  const Tensor& key_cache;
  const Tensor& value_cache;
  const Tensor* k_scales;  // null: none given
  const Tensor* v_scales;
  const std::string& cache_quant_type;
  const std::string& fp8_format;
  CacheLayout layout = CacheLayout::kFastattn;
  // block_tables where they may be [B, KV, max_blocks]: a cache of one head is then a pool of
  // blocks that all of these KV heads share.
  const Tensor* head_tables = nullptr;
  // Head dimension of the operator's K or Q, if it has one: 0 if not known.
  int64_t head_dim = 0;
};

// Head dimension of a tensor [tokens, heads, D] that may not have been checked yet; 0 if it has no
// such shape.
inline int64_t HeadDimOf(const Tensor& tensor) {
  return tensor.dims().size() == 3 ? tensor.dims()[2] : 0;
}

// Strides of a cache [num_blocks, KV, rows, columns] or of dynamic scales [num_blocks, KV,
// columns]. The last dimension must be contiguous; the others may have any positive strides, in any
// order. With `whole_planes` the rows of a block and head must lie side by side. The operator
// checks what a GPU's kernels need beyond that.
CacheStrides ParseCacheStrides(const char* op, const char* name, const Tensor& tensor,
                               bool whole_planes = false);

// Checks shapes, dtypes, place, strides and scales and fills a PagedCache. Throws on the first that
// is wrong. No tensor is copied: the kernels read and write it where it lies.
PagedCache ParsePagedCache(const char* op, const CacheArgs& args, const phi::Place& place);

// Refuses a cache that a GPU's kernels cannot read 16 bytes at a time.
void RequireAlignedCache(const char* op, const PagedCache& cache);

// Refuses a cache that is written if its key and value tensors or its dynamic scales share memory
// with each other or with a tensor that is read, or if elements of one of these tensors do.
// Everything has been checked before.
void RequireCacheApart(const char* op, const CacheArgs& args, CacheType type,
                       const std::vector<NamedTensor>& read);

// An int of each sequence, [size] or [size, 1], as the operators receive them; `why` is what an
// error adds to the shape expected.
template <typename... Why>
const int* ParseLengths(const char* op, const char* name, const Tensor& tensor, int64_t size,
                        const phi::Place& place, const Why&... why) {
  Arg(op, name, tensor).On(place).Dtype({phi::DataType::INT32}).Contiguous();
  const auto& dims = tensor.dims();
  if (tensor.numel() != size || dims.size() == 0 || dims[0] != size) {
    Fail("ValueError", op, name, "expected shape [", size, "]", why..., ", got ",
         ShapeText(SizesOf(tensor)));
  }
  return Data<int>(tensor);
}

// Checks dtypes, places and sizes (not values: those live on the device) and fills a SeqMeta of the
// B sequences of seq_lens_this_time. block_tables and seq_lens_decoder may both have more: slots
// that do not run. The length tensors may be [B] or [B, 1]. With `table_heads` the cache has as
// many heads, and may have a table for each of them: [slots, table_heads, max_blocks].
SeqMeta ParseSeqs(const char* op, const Tensor& block_tables, const Tensor& cu_seqlens_q,
                  const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
                  const Tensor* batch_id_per_token, int64_t num_tokens, const phi::Place& place,
                  int64_t table_heads = 0);

// Refuses more new tokens than a GPU's kernel for a block table for each KV head can take.
void RequireGridOfTokens(const char* op, const SeqMeta& seqs);

// Token stride of a tensor [tokens, KV, D] whose heads of one token must lie side by side.
int64_t HeadsContiguous(const char* op, const char* name, const Tensor& tensor);

}  // namespace fastattn::api
