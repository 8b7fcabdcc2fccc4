#include "cpu/indexer_keys.h"

#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/indexer_quant.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "params/indexer_keys.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/indexer/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kWriteOp = "indexer_k_write_cache";
constexpr const char* kGatherOp = "indexer_k_gather";

// [num_pages, ...bytes], of which a page's bytes lie side by side; pages may lie further apart.
IndexerPages ParsePages(const char* op, const Tensor& cache, int64_t page_size,
                        const std::string& quant, const phi::Place& place) {
  Arg(op, "cache", cache).On(place).Dtype({phi::DataType::UINT8});
  const Sizes shape = SizesOf(cache);
  if (shape.size() < 2) {
    Fail("ValueError", op, "cache", "expected [num_pages, page_bytes], got shape ",
         ShapeText(shape));
  }
  if (page_size <= 0) {
    Fail("ValueError", op, "page_size", "expected a positive number of tokens, got ", page_size);
  }
  IndexerPages pages;
  pages.quant = ParseIndexerQuant(op, quant);
  const IndexerPageFormat format = PageFormatOf(pages.quant);
  const int token_bytes = format.code_bytes + format.scale_bytes;
  const int64_t needed = CheckedProduct(op, "page_size", {page_size, token_bytes});
  int64_t bytes = 1;
  const Sizes strides = StridesOf(cache);
  for (size_t i = shape.size(); i-- > 1;) {
    if (cache.numel() > 0 && shape[i] != 1 && strides[i] != bytes) {
      Fail("ValueError", op, "cache", "expected the bytes of a page side by side, got shape ",
           ShapeText(shape), " with strides ", ShapeText(strides));
    }
    bytes = CheckedProduct(op, "cache", {bytes, shape[i]});
  }
  if (bytes < needed) {
    Fail("ValueError", op, "cache", "expected pages of at least ", needed, " bytes (", page_size,
         " tokens of ", token_bytes, "), got shape ", ShapeText(shape));
  }
  pages.num_pages = shape[0];
  pages.page_size = page_size;
  pages.page_stride = shape[0] > 1 ? strides[0] : bytes;
  return pages;
}

void CheckGathered(const Tensor* out, const Tensor* out_scales, int64_t rows, int code_bytes) {
  if (out != nullptr) {
    Arg(kGatherOp, "out", *out).Dtype({phi::DataType::UINT8}).Dims({rows, code_bytes}).Contiguous();
  }
  if (out_scales != nullptr) {
    Arg(kGatherOp, "out_scales", *out_scales)
        .Dtype({phi::DataType::FLOAT32, phi::DataType::INT32, phi::DataType::UINT8})
        .Contiguous();
    const auto size = static_cast<int64_t>(phi::SizeOf(out_scales->dtype()));
    if (out_scales->numel() * size < 4 * rows) {
      Fail("ValueError", kGatherOp, "out_scales", "expected at least ", 4 * rows,
           " bytes, 4 a row, got shape ", ShapeText(SizesOf(*out_scales)));
    }
  }
  if ((out == nullptr) != (out_scales == nullptr)) {
    Fail("ValueError", kGatherOp, out == nullptr ? "out" : "out_scales",
         "expected both out and out_scales, or neither");
  }
}

IndexerScaleRule ParseKeyScaleRule(const std::string& name) {
  if (name == "pow2") return IndexerScaleRule::kPow2;
  if (name == "amax") return IndexerScaleRule::kAmax;
  if (name == "amax_div") return IndexerScaleRule::kAmaxDiv;
  Fail("ValueError", kWriteOp, "scale_rule", "expected pow2, amax or amax_div, got '", name, "'");
}

phi::DataType KeyScaleDtype(const std::string& quant) {
  return quant == "fp8" ? phi::DataType::FLOAT32 : phi::DataType::INT32;
}

}  // namespace

FASTATTN_OPERATOR(void, kWriteOp, IndexerKWriteCache, NoResults,
                  (const Strided<Tensor>& key, Tensor& cache, const Tensor& slot_mapping,
                   int64_t page_size, const std::string& quant, const std::string& scale_rule)) {
  Arg(kWriteOp, "key", key)
      .Dtype({phi::DataType::BFLOAT16, phi::DataType::FLOAT16, phi::DataType::FLOAT32})
      .Dims({-1, kIndexerHeadDim})
      .LastDimContiguous();
  const Arg cache_arg(kWriteOp, "cache", cache);
  const phi::Place place = cache.place();
  Arg(kWriteOp, "key", key).On(place);
  Arg(kWriteOp, "slot_mapping", slot_mapping)
      .On(place)
      .Dtype({phi::DataType::INT64, phi::DataType::INT32})
      .Rank(1)
      .Contiguous();
  IndexerKWriteParams p;
  p.pages = ParsePages(kWriteOp, cache, page_size, quant, place);
  p.scale_rule = ParseKeyScaleRule(scale_rule);
  if (p.scale_rule != IndexerScaleRule::kPow2 && p.pages.quant != IndexerQuant::kFp8) {
    Fail("ValueError", kWriteOp, "scale_rule", "expected pow2 with mxfp4, got '", scale_rule, "'");
  }
  p.num_tokens = SizesOf(slot_mapping)[0];
  if (p.num_tokens > SizesOf(key)[0]) {
    Fail("ValueError", kWriteOp, "slot_mapping", "expected at most ", SizesOf(key)[0],
         " slots, as key has tokens, got ", p.num_tokens);
  }
  RequireNoOverlap(kWriteOp, "cache", cache);
  RequireApart(kWriteOp, "cache", cache, {{"key", &key}, {"slot_mapping", &slot_mapping}});
  if (p.num_tokens == 0 || cache.numel() == 0) return;
  p.key = Data(key);
  p.key_dtype = ToDType(kWriteOp, "key", key.dtype());
  p.key_stride = StridesOf(key)[0];
  p.slots = {Data(slot_mapping), slot_mapping.dtype() == phi::DataType::INT64};
  p.cache = MutableData<uint8_t>(cache);
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cache)) {
    LaunchOnGpu(kWriteOp, cache,
                [&](cudaStream_t stream) { return cuda::LaunchIndexerKWrite(p, stream); });
    return;
  }
#endif
  RequireCpu(kWriteOp, place);
  Guarded(kWriteOp, [&] { cpu::IndexerKWrite(p); });
}

namespace {

Results GatherResults(const Known& in) {
  const KnownInput& given = in["out_scales"];
  const std::string quant = in.Text("quant");
  const int64_t tokens = in.Integer("num_tokens");
  const int64_t bytes = Inferred<int64_t>(
      -1, [&] { return PageFormatOf(ParseIndexerQuant(kGatherOp, quant)).code_bytes; });
  return {{"codes", {tokens, bytes}, phi::DataType::UINT8},
          {"scales", given.given() ? given.shape : Shape{tokens},
           given.given() ? given.dtype : KeyScaleDtype(quant)}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kGatherOp, IndexerKGather, GatherResults,
                  (const Strided<Tensor>& cache, const Tensor& block_tables,
                   const Tensor& cu_seqlens_k, OptionalTensor& out, OptionalTensor& out_scales,
                   int64_t num_tokens, int64_t page_size, const std::string& quant)) {
  Arg(kGatherOp, "block_tables", block_tables).Dtype({phi::DataType::INT32}).Rank(2).Contiguous();
  Arg(kGatherOp, "cu_seqlens_k", cu_seqlens_k).Dtype({phi::DataType::INT32}).Rank(1).Contiguous();
  const phi::Place place = cu_seqlens_k.place();
  Arg(kGatherOp, "block_tables", block_tables).On(place);
  const Sizes tables = SizesOf(block_tables), starts = SizesOf(cu_seqlens_k);
  for (int64_t size : tables) RequireFits(kGatherOp, "block_tables", size);
  if (starts[0] < 1 || starts[0] - 1 > tables[0]) {
    Fail("ValueError", kGatherOp, "cu_seqlens_k", "expected 1 to ", tables[0] + 1,
         " elements, block_tables has ", tables[0], " rows, got ", starts[0]);
  }
  if (num_tokens < 0) {
    Fail("ValueError", kGatherOp, "num_tokens", "expected at least 0, got ", num_tokens);
  }
  IndexerKGatherParams p;
  p.pages = ParsePages(kGatherOp, cache, page_size, quant, place);
  const int code_bytes = PageFormatOf(p.pages.quant).code_bytes;
  CheckedProduct(kGatherOp, "num_tokens", {num_tokens, code_bytes});
  CheckGathered(Get(out), Get(out_scales), num_tokens, code_bytes);
  if (const Tensor* given = Get(out)) {
    const Tensor* scales = Get(out_scales);
    Arg(kGatherOp, "out", *given).On(place);
    Arg(kGatherOp, "out_scales", *scales).On(place);
    for (const auto& [name, tensor] : {NamedTensor{"out", given}, {"out_scales", scales}}) {
      RequireApart(kGatherOp, name, *tensor,
                   {{"cache", &cache},
                    {"block_tables", &block_tables},
                    {"cu_seqlens_k", &cu_seqlens_k},
                    {"the other result", tensor == given ? scales : given}});
    }
  }
  Tensor codes = Get(out) != nullptr
                     ? *Get(out)
                     : paddle::empty({num_tokens, code_bytes}, phi::DataType::UINT8, place);
  Tensor scales = Get(out) != nullptr ? *Get(out_scales)
                                      : paddle::empty({num_tokens}, KeyScaleDtype(quant), place);
  if (num_tokens == 0 || cache.numel() == 0 || starts[0] < 2 || tables[1] == 0) {
    return {codes, scales};
  }
  p.cache = Data<uint8_t>(cache);
  p.block_tables = Data<int32_t>(block_tables);
  p.cu_seqlens = Data<int32_t>(cu_seqlens_k);
  p.codes = MutableData<uint8_t>(codes);
  p.scales = static_cast<uint8_t*>(MutableData(scales));
  p.batch = static_cast<int>(starts[0] - 1);
  p.max_blocks = static_cast<int>(tables[1]);
  p.num_rows = num_tokens;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cu_seqlens_k)) {
    LaunchOnGpu(kGatherOp, cu_seqlens_k,
                [&](cudaStream_t stream) { return cuda::LaunchIndexerKGather(p, stream); });
    return {codes, scales};
  }
#endif
  RequireCpu(kGatherOp, place);
  Guarded(kGatherOp, [&] { cpu::IndexerKGather(p); });
  return {codes, scales};
}

}  // namespace fastattn::api
