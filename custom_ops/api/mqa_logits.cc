#include "cpu/mqa_logits.h"

#include <limits>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/direct.h"
#include "api/indexer_quant.h"
#include "api/paged_cache.h"
#include "api/sizes.h"
#include "params/mqa_logits.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mqa_logits/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kRaggedOp = "mqa_logits";
constexpr const char* kPagedOp = "paged_mqa_logits";

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

// Allocates the result, or takes `out`.
Tensor SetOut(const char* op, const OptionalTensor& out, const phi::Place& place, int64_t columns,
              std::initializer_list<NamedTensor> inputs, LogitsParams* p) {
  CheckedProduct(op, "out", {p->rows, columns, static_cast<int64_t>(sizeof(float))});
  const Tensor* given = Get(out);
  if (given != nullptr) {
    Arg(op, "out", *given)
        .On(place)
        .Dtype({phi::DataType::FLOAT32})
        .Dims({p->rows, columns})
        .LastDimContiguous();
    RequireNoOverlap(op, "out", *given);
    RequireApart(op, "out", *given, inputs);
  }
  Tensor result =
      given != nullptr ? *given : paddle::empty({p->rows, columns}, phi::DataType::FLOAT32, place);
  p->out = MutableData<float>(result);
  p->columns = columns;
  p->row_stride = p->rows > 1 && result.numel() > 0 ? StridesOf(result)[0] : columns;
  return result;
}

void Run(const char* op, const LogitsParams& p, const Tensor& q) {
  if (p.rows == 0 || p.columns == 0) return;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(q)) {
    LaunchOnGpu(op, q, [&](cudaStream_t stream) { return cuda::LaunchMqaLogits(p, stream); });
    return;
  }
#endif
  RequireCpu(op, q.place());
  Guarded(op, [&] { cpu::MqaLogits(p); });
}

// The cache [num_pages, ...bytes]: a page's bytes lie side by side, pages may lie further apart.
void SetPages(const Tensor& cache, int64_t page_size, const phi::Place& place, LogitsParams* p) {
  Arg(kPagedOp, "cache", cache).On(place).Dtype({phi::DataType::UINT8});
  const Sizes shape = SizesOf(cache);
  if (shape.size() < 2) {
    Fail("ValueError", kPagedOp, "cache", "expected [num_pages, page_bytes], got shape ",
         ShapeText(shape));
  }
  if (page_size <= 0) {
    Fail("ValueError", kPagedOp, "page_size", "expected a positive number of tokens, got ",
         page_size);
  }
  const Sizes strides = StridesOf(cache);
  int64_t bytes = 1;
  for (size_t i = shape.size(); i-- > 1;) {
    if (cache.numel() > 0 && shape[i] != 1 && strides[i] != bytes) {
      Fail("ValueError", kPagedOp, "cache", "expected the bytes of a page side by side, got shape ",
           ShapeText(shape), " with strides ", ShapeText(strides));
    }
    bytes = CheckedProduct(kPagedOp, "cache", {bytes, shape[i]});
  }
  const int token = p->CodeBytes() + kLogitsScaleBytes;
  const int64_t needed = CheckedProduct(kPagedOp, "page_size", {page_size, token});
  if (bytes < needed) {
    Fail("ValueError", kPagedOp, "cache", "expected pages of at least ", needed, " bytes (",
         page_size, " tokens of ", token, "), got shape ", ShapeText(shape));
  }
  RequireFits(kPagedOp, "cache", shape[0]);
  RequireFits(kPagedOp, "page_size", page_size);
  p->cache = Data<uint8_t>(cache);
  p->num_pages = shape[0];
  p->page_size = page_size;
  p->page_stride = shape[0] > 1 && cache.numel() > 0 ? strides[0] : bytes;
  if (cache.place().GetType() == phi::AllocationType::GPU) {
    RequireAlignedAddress(kPagedOp, "cache", cache, kLogitsScaleBytes);
    if (p->page_stride % kLogitsScaleBytes != 0) {
      Fail("ValueError", kPagedOp, "cache", "expected pages a multiple of 4 bytes apart on a GPU, ",
           "got ", p->page_stride);
    }
  }
}

void SetSequences(const Tensor& context_lens, const Tensor& block_tables, const phi::Place& place,
                  LogitsParams* p) {
  p->lens_per_row = context_lens.defined() && SizesOf(context_lens).size() == 2;
  CheckInt32(kPagedOp, "context_lens", context_lens, place,
             p->lens_per_row ? Sizes{p->batch, p->next_n} : Sizes{p->batch});
  Arg(kPagedOp, "block_tables", block_tables)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Rank(2)
      .LastDimContiguous();
  const Sizes shape = SizesOf(block_tables);
  if (shape[0] < p->batch) {
    Fail("ValueError", kPagedOp, "block_tables", "expected at least ", p->batch,
         " sequences, got shape ", ShapeText(shape));
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

std::vector<Tensor> MqaLogits(const Tensor& q, const Tensor& keys, const Tensor& k_scales,
                              const Tensor& weights, const Tensor& starts, const Tensor& ends,
                              const OptionalTensor& q_scales, const OptionalTensor& out,
                              int64_t max_seqlen_k, const std::string& quant) {
  Arg(kRaggedOp, "q", q).Rank(3);
  const phi::Place place = q.place();
  LogitsParams p;
  SetQueries(kRaggedOp, q, weights, q_scales, quant, SizesOf(q)[0], &p);
  CheckCodes(kRaggedOp, "keys", keys, p.quant);
  Arg(kRaggedOp, "keys", keys).On(place).Dims({-1, p.CodeBytes()}).Contiguous();
  CheckAddress(kRaggedOp, "keys", keys);
  p.num_keys = SizesOf(keys)[0];
  RequireFits(kRaggedOp, "keys", p.num_keys);
  RequireFits(kRaggedOp, "q", p.rows);
  Arg(kRaggedOp, "k_scales", k_scales)
      .On(place)
      .Dtype({ScaleDtype(p)})
      .Dims({p.num_keys})
      .Contiguous();
  CheckInt32(kRaggedOp, "starts", starts, place, {p.rows});
  CheckInt32(kRaggedOp, "ends", ends, place, {p.rows});
  p.keys = Data<uint8_t>(keys);
  p.key_scales = Data<uint8_t>(k_scales);
  p.starts = Data<int32_t>(starts);
  p.ends = Data<int32_t>(ends);
  p.relative = max_seqlen_k >= 0;
  const int64_t columns = p.relative ? max_seqlen_k : p.num_keys;
  RequireFits(kRaggedOp, "max_seqlen_k", columns);
  Tensor logits = SetOut(kRaggedOp, out, place, columns,
                         {{"q", &q},
                          {"keys", &keys},
                          {"k_scales", &k_scales},
                          {"weights", &weights},
                          {"starts", &starts},
                          {"ends", &ends},
                          {"q_scales", Get(q_scales)}},
                         &p);
  Run(kRaggedOp, p, q);
  return {logits};
}

std::vector<Tensor> PagedMqaLogits(const Tensor& q, const Tensor& cache, const Tensor& weights,
                                   const Tensor& context_lens, const Tensor& block_tables,
                                   const OptionalTensor& q_scales, const OptionalTensor& out,
                                   int64_t max_context_len, int64_t page_size,
                                   const std::string& quant) {
  Arg(kPagedOp, "q", q).Rank(4);
  const phi::Place place = q.place();
  LogitsParams p;
  p.paged = true;
  p.batch = SizesOf(q)[0];
  p.next_n = SizesOf(q)[1];
  const int64_t rows = CheckedProduct(kPagedOp, "q", {p.batch, p.next_n});
  SetQueries(kPagedOp, q, weights, q_scales, quant, rows, &p);
  RequireFits(kPagedOp, "q", rows);
  SetPages(cache, page_size, place, &p);
  SetSequences(context_lens, block_tables, place, &p);
  if (max_context_len < 0) {
    Fail("ValueError", kPagedOp, "max_context_len", "expected at least 0, got ", max_context_len);
  }
  RequireFits(kPagedOp, "max_context_len", max_context_len);
  Tensor logits = SetOut(kPagedOp, out, place, max_context_len,
                         {{"q", &q},
                          {"cache", &cache},
                          {"weights", &weights},
                          {"context_lens", &context_lens},
                          {"block_tables", &block_tables},
                          {"q_scales", Get(q_scales)}},
                         &p);
  Run(kPagedOp, p, q);
  return {logits};
}

// An error gives unknown sizes; the kernel raises it.
std::vector<Shape> MqaLogitsInferShape(const Shape& q, const Shape& keys, const Shape& k_scales,
                                       const Shape& weights, const Shape& starts, const Shape& ends,
                                       const paddle::optional<Shape>& q_scales,
                                       const paddle::optional<Shape>& out, int64_t max_seqlen_k,
                                       const std::string& quant) {
  const int64_t columns = max_seqlen_k >= 0 ? max_seqlen_k : keys.empty() ? -1 : keys[0];
  return {{q.empty() ? -1 : q[0], columns}};
}

std::vector<phi::DataType> MqaLogitsInferDtype(
    const phi::DataType& q, const phi::DataType& keys, const phi::DataType& k_scales,
    const phi::DataType& weights, const phi::DataType& starts, const phi::DataType& ends,
    const paddle::optional<phi::DataType>& q_scales, const paddle::optional<phi::DataType>& out,
    int64_t max_seqlen_k, const std::string& quant) {
  return {phi::DataType::FLOAT32};
}

std::vector<Shape> PagedMqaLogitsInferShape(const Shape& q, const Shape& cache,
                                            const Shape& weights, const Shape& context_lens,
                                            const Shape& block_tables,
                                            const paddle::optional<Shape>& q_scales,
                                            const paddle::optional<Shape>& out,
                                            int64_t max_context_len, int64_t page_size,
                                            const std::string& quant) {
  const bool known = q.size() == 4 && q[0] >= 0 && q[1] >= 0;
  return {{known ? q[0] * q[1] : -1, max_context_len}};
}

std::vector<phi::DataType> PagedMqaLogitsInferDtype(
    const phi::DataType& q, const phi::DataType& cache, const phi::DataType& weights,
    const phi::DataType& context_lens, const phi::DataType& block_tables,
    const paddle::optional<phi::DataType>& q_scales, const paddle::optional<phi::DataType>& out,
    int64_t max_context_len, int64_t page_size, const std::string& quant) {
  return {phi::DataType::FLOAT32};
}

}  // namespace fastattn::api

PD_BUILD_OP(fastattn_mqa_logits)
    .Inputs({"q", "keys", "k_scales", "weights", "starts", "ends", paddle::Optional("q_scales"),
             paddle::Optional("out")})
    .Outputs({"logits", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_seqlen_k: int64_t", "quant: std::string"})
    .SetKernelFn(PD_KERNEL(fastattn::api::MqaLogits))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::MqaLogitsInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::MqaLogitsInferDtype));

PD_BUILD_OP(fastattn_paged_mqa_logits)
    .Inputs({"q", "cache", "weights", "context_lens", "block_tables", paddle::Optional("q_scales"),
             paddle::Optional("out")})
    .Outputs({"logits", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_context_len: int64_t", "page_size: int64_t", "quant: std::string"})
    .SetKernelFn(PD_KERNEL(fastattn::api::PagedMqaLogits))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::PagedMqaLogitsInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::PagedMqaLogitsInferDtype));

namespace fastattn::api {

namespace {

const bool kDirectMqaLogits = AddDirect<&MqaLogits>("fastattn_mqa_logits", {"out"});
const bool kDirectPagedMqaLogits =
    AddDirect<&PagedMqaLogits>("fastattn_paged_mqa_logits", {"cache", "block_tables", "out"});

}  // namespace

}  // namespace fastattn::api
