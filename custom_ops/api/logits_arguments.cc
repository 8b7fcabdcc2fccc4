#include "api/logits_arguments.h"

#include <vector>

#include "api/indexer_quant.h"
#include "api/paged_cache.h"
#include "api/sizes.h"

namespace fastattn::api {

namespace {

void CheckCodes(const char* op, const char* name, const Tensor& codes, IndexerQuant quant) {
  const Arg arg(op, name, codes);
  if (quant == IndexerQuant::kFp8 &&
      detail::Fp8Dtypes<phi::DataType>::Is(codes.dtype(), DType::kE4M3)) {
    return;
  }
  arg.Dtype({phi::DataType::UINT8});
}

// Kernels read four bytes at once.
void CheckAddress(const char* op, const char* name, const Tensor& codes) {
  RequireAlignedAddress(op, name, codes, 4);
}

void CheckInt32(const char* op, const char* name, const Tensor& tensor, const phi::Place& place,
                const Sizes& dims) {
  Arg(op, name, tensor).On(place).Dtype({phi::DataType::INT32}).Dims(dims).Contiguous();
}

// q, weights and q_scales, of which the leading dimensions are `rows` in all.
void SetQueries(const char* op, const Tensor& q, const Tensor& weights,
                const OptionalTensor& q_scales, const std::string& quant, int64_t rows,
                LogitsParams* p) {
  p->quant = ParseIndexerQuant(op, quant);
  CheckCodes(op, "q", q, p->quant);
  Arg(op, "q", q).Contiguous();
  CheckAddress(op, "q", q);
  const Sizes shape = SizesOf(q);
  const int64_t heads = shape[shape.size() - 2];
  const int64_t dim = shape.back() * (p->quant == IndexerQuant::kFp8 ? 1 : 2);
  if (dim != 64 && dim != 128) {
    Fail("NotImplementedError", op, "q", "expected 64 or 128 channels, got ", dim);
  }
  if (heads < 8 || heads > kLogitsMaxHeads || heads % 8 != 0) {
    Fail("NotImplementedError", op, "q", "expected a multiple of 8 heads, at most ",
         kLogitsMaxHeads, ", got ", heads);
  }
  const phi::Place place = q.place();
  Arg(op, "weights", weights)
      .On(place)
      .Dtype({phi::DataType::FLOAT32})
      .Dims({rows, heads})
      .Contiguous();
  const Tensor* scales = Get(q_scales);
  const bool wanted = p->quant == IndexerQuant::kMxfp4;
  // Paddle hands an empty optional tensor over as an absent one.
  if (scales != nullptr ? !wanted : wanted && rows > 0) {
    Fail("ValueError", op, "q_scales",
         scales == nullptr ? "expected a tensor with mxfp4, got None"
                           : "expected None with fp8: the weights include the scales of q");
  }
  if (scales != nullptr) {
    Sizes dims(std::vector<int64_t>(shape.begin(), shape.end() - 1));
    CheckInt32(op, "q_scales", *scales, place, dims);
    p->q_scales = Data<uint8_t>(*scales);
  }
  p->q = Data<uint8_t>(q);
  p->weights = Data<float>(weights);
  p->head_dim = static_cast<int>(dim);
  p->num_heads = static_cast<int>(heads);
  p->rows = rows;
}

// The cache [num_pages, ...bytes]: a page's bytes lie side by side, pages may lie further apart.
void SetPages(const char* op, const Tensor& cache, int64_t page_size, const phi::Place& place,
              LogitsParams* p) {
  Arg(op, "cache", cache).On(place).Dtype({phi::DataType::UINT8});
  const Sizes shape = SizesOf(cache);
  if (shape.size() < 2) {
    Fail("ValueError", op, "cache", "expected [num_pages, page_bytes], got shape ",
         ShapeText(shape));
  }
  if (page_size <= 0) {
    Fail("ValueError", op, "page_size", "expected a positive number of tokens, got ", page_size);
  }
  const Sizes strides = StridesOf(cache);
  int64_t bytes = 1;
  for (size_t i = shape.size(); i-- > 1;) {
    if (cache.numel() > 0 && shape[i] != 1 && strides[i] != bytes) {
      Fail("ValueError", op, "cache", "expected the bytes of a page side by side, got shape ",
           ShapeText(shape), " with strides ", ShapeText(strides));
    }
    bytes = CheckedProduct(op, "cache", {bytes, shape[i]});
  }
  const int token = p->CodeBytes() + kLogitsScaleBytes;
  const int64_t needed = CheckedProduct(op, "page_size", {page_size, token});
  if (bytes < needed) {
    Fail("ValueError", op, "cache", "expected pages of at least ", needed, " bytes (", page_size,
         " tokens of ", token, "), got shape ", ShapeText(shape));
  }
  RequireFits(op, "cache", shape[0]);
  RequireFits(op, "page_size", page_size);
  p->cache = Data<uint8_t>(cache);
  p->num_pages = shape[0];
  p->page_size = page_size;
  p->page_stride = shape[0] > 1 && cache.numel() > 0 ? strides[0] : bytes;
  if (IsGpu(cache.place())) {
    RequireAlignedAddress(op, "cache", cache, kLogitsScaleBytes);
    if (p->page_stride % kLogitsScaleBytes != 0) {
      Fail("ValueError", op, "cache", "expected pages a multiple of 4 bytes apart on a GPU, ",
           "got ", p->page_stride);
    }
  }
}

void SetSequences(const char* op, const Tensor& context_lens, const Tensor& block_tables,
                  const phi::Place& place, LogitsParams* p) {
  p->lens_per_row = context_lens.defined() && SizesOf(context_lens).size() == 2;
  CheckInt32(op, "context_lens", context_lens, place,
             p->lens_per_row ? Sizes{p->batch, p->next_n} : Sizes{p->batch});
  Arg(op, "block_tables", block_tables)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Rank(2)
      .LastDimContiguous();
  const Sizes shape = SizesOf(block_tables);
  if (shape[0] < p->batch) {
    Fail("ValueError", op, "block_tables", "expected at least ", p->batch, " sequences, got shape ",
         ShapeText(shape));
  }
  p->context_lens = Data<int32_t>(context_lens);
  p->block_tables = Data<int32_t>(block_tables);
  p->max_blocks = block_tables.numel() == 0 ? 0 : shape[1];
  p->table_stride = block_tables.numel() == 0 ? 0 : StridesOf(block_tables)[0];
  if (shape[0] <= 1) p->table_stride = shape[1];
}

phi::DataType ScaleDtype(const LogitsParams& p) {
  return p.quant == IndexerQuant::kFp8 ? phi::DataType::FLOAT32 : phi::DataType::INT32;
}

}  // namespace

LogitsParams RaggedLogits(const char* op, const Tensor& q, const Tensor& keys,
                          const Tensor& k_scales, const Tensor& weights, const Tensor& starts,
                          const Tensor& ends, const OptionalTensor& q_scales, int64_t max_seqlen_k,
                          const std::string& quant) {
  Arg(op, "q", q).Rank(3);
  const phi::Place place = q.place();
  LogitsParams p;
  SetQueries(op, q, weights, q_scales, quant, SizesOf(q)[0], &p);
  CheckCodes(op, "keys", keys, p.quant);
  Arg(op, "keys", keys).On(place).Dims({-1, p.CodeBytes()}).Contiguous();
  CheckAddress(op, "keys", keys);
  p.num_keys = SizesOf(keys)[0];
  RequireFits(op, "keys", p.num_keys);
  RequireFits(op, "q", p.rows);
  Arg(op, "k_scales", k_scales).On(place).Dtype({ScaleDtype(p)}).Dims({p.num_keys}).Contiguous();
  CheckInt32(op, "starts", starts, place, {p.rows});
  CheckInt32(op, "ends", ends, place, {p.rows});
  p.keys = Data<uint8_t>(keys);
  p.key_scales = Data<uint8_t>(k_scales);
  p.starts = Data<int32_t>(starts);
  p.ends = Data<int32_t>(ends);
  p.relative = max_seqlen_k >= 0;
  p.columns = p.relative ? max_seqlen_k : p.num_keys;
  RequireFits(op, "max_seqlen_k", p.columns);
  return p;
}

LogitsParams PagedLogits(const char* op, const Tensor& q, const Tensor& cache,
                         const Tensor& weights, const Tensor& context_lens,
                         const Tensor& block_tables, const OptionalTensor& q_scales,
                         int64_t max_context_len, int64_t page_size, const std::string& quant) {
  Arg(op, "q", q).Rank(4);
  const phi::Place place = q.place();
  LogitsParams p;
  p.paged = true;
  p.batch = SizesOf(q)[0];
  p.next_n = SizesOf(q)[1];
  const int64_t rows = CheckedProduct(op, "q", {p.batch, p.next_n});
  SetQueries(op, q, weights, q_scales, quant, rows, &p);
  RequireFits(op, "q", rows);
  SetPages(op, cache, page_size, place, &p);
  SetSequences(op, context_lens, block_tables, place, &p);
  if (max_context_len < 0) {
    Fail("ValueError", op, "max_context_len", "expected at least 0, got ", max_context_len);
  }
  RequireFits(op, "max_context_len", max_context_len);
  p.columns = max_context_len;
  return p;
}

}  // namespace fastattn::api
