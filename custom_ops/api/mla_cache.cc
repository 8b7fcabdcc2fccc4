#include "cpu/mla_cache.h"

#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/index_array.h"
#include "api/mla_cache.h"
#include "api/operator.h"
#include "api/paged_cache.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mla/cache/launch.h"
#endif

namespace fastattn::api {

MlaFormat ParseMlaFormat(const char* op, const std::string& name, const MlaNames& names) {
  for (const MlaFormat format : {MlaFormat::kBf16, MlaFormat::kFp8, MlaFormat::kFp8x656,
                                 MlaFormat::kFp8x584, MlaFormat::kFp8x528}) {
    if (name == NameOf(format)) return format;
  }
  Fail("NotImplementedError", op, names.format, "'", name,
       "' is not supported; supported: bf16, fp8, fp8_656, fp8_584, fp8_528");
}

namespace {

// Tokens of a page: the attribute for a cache of whole pages, else the shape's.
int64_t PageSize(const char* op, const Sizes& shape, int page_size, const MlaNames& names) {
  const int64_t own = shape.size() == 3 || shape[2] == 1 ? shape[1] : shape[2];
  if (page_size != 0 && page_size != own) {
    Fail("ValueError", op, names.page_size, "expected ", own, " as in ", names.cache, "'s shape ",
         ShapeText(shape), ", got ", page_size);
  }
  return own;
}

// The dimension of a page's tokens in a cache of 3 or 4 dimensions; -1 if there is none.
int TokenDim(const Sizes& shape) {
  if (shape.size() == 3) return 1;
  if (shape.size() != 4) return -1;
  return shape[2] == 1 ? 1 : shape[1] == 1 ? 2 : -1;
}

void CheckPages(const char* op, const Sizes& shape, int64_t width, int page_size,
                const MlaNames& names) {
  if (page_size <= 0) {
    Fail("ValueError", op, names.page_size,
         "a cache [num_pages, page_bytes] needs a positive number ", "of tokens, got ", page_size);
  }
  if (shape[1] < CheckedProduct(op, names.page_size, {page_size, width})) {
    Fail("ValueError", op, names.cache, "expected pages of at least ", page_size * width,
         " elements (", page_size, " tokens of ", width, "), got shape ", ShapeText(shape));
  }
}

void CheckStride(const char* op, const char* name, int64_t count, int64_t stride, bool on_gpu) {
  if (count <= 1) return;
  if (stride < 0 || (on_gpu && stride % kVectorBytes != 0)) {
    Fail("ValueError", op, name, "expected ",
         on_gpu ? "strides of a multiple of 16 bytes on a "
                  "GPU"
                : "positive strides",
         ", got one of ", stride, " bytes");
  }
}

}  // namespace

MlaCache ParseMlaCache(const char* op, const Tensor& cache, MlaFormat format, int page_size,
                       const phi::Place& place, const MlaNames& names, int bf16_channels) {
  const char* name = names.cache;
  const Arg arg(op, name, cache);
  arg.On(place).LastDimContiguous();
  if (format == MlaFormat::kBf16) {
    arg.Dtype({phi::DataType::BFLOAT16});
  } else if (ToDType(op, name, cache.dtype()) != DType::kE4M3) {
    arg.Dtype({phi::DataType::UINT8});
  }
  const Sizes shape = SizesOf(cache), strides = StridesOf(cache);
  const MlaFormatFacts facts = FactsOf(format);
  const auto element = static_cast<int64_t>(phi::SizeOf(cache.dtype()));
  const bool bf16 = format == MlaFormat::kBf16;
  const int64_t width = bf16 ? bf16_channels : facts.token_bytes / element;
  const int64_t row_bytes = bf16 ? width * element : facts.row_bytes;
  const bool pages = shape.size() == 2;
  const int token_dim = pages ? -1 : TokenDim(shape);
  if (!pages && (token_dim < 0 || shape.back() != width)) {
    Fail("ValueError", op, name, "expected shape [?, ?, ", width, "], [?, ?, 1, ", width,
         "], [?, 1, ?, ", width, "] or, with page_size, [?, page_bytes] for ", NameOf(format),
         ", got ", ShapeText(shape));
  }
  if (pages) CheckPages(op, shape, width, page_size, names);
  const int64_t size = pages ? page_size : PageSize(op, shape, page_size, names);
  MlaCache result;
  result.format = format;
  result.num_pages = shape[0];
  if (size == 0 || cache.numel() == 0) {  // no slot
    result.num_pages = 0;
    result.row_stride = row_bytes;
    return result;
  }
  if (CheckedProduct(op, name, {shape[0], size}) >= int64_t{1} << 31) {
    Fail("ValueError", op, name, "expected fewer than 2^31 tokens, got shape ", ShapeText(shape));
  }
  const bool on_gpu = IsGpu(place);
  result.page_size = static_cast<int>(size);
  result.page_stride = strides[0] * element;
  result.row_stride = row_bytes;
  if (token_dim >= 0 && size > 1) {
    const int64_t stride = strides[token_dim] * element;
    if (ScalePlaneBytes(format) == 0) {
      CheckStride(op, name, size, stride, on_gpu);
      result.row_stride = stride;
    } else if (stride != facts.token_bytes) {
      Fail("ValueError", op, name, "expected stride ", width, " between a page's tokens in ",
           NameOf(format), ", whose rows and scales lie apart, got strides ", ShapeText(strides));
    }
  }
  CheckStride(op, name, shape[0], result.page_stride, on_gpu);
  if (shape[0] == 1) result.page_stride = size * result.row_stride;  // unchecked: any will do
  RequireAlignedAddress(op, name, cache, kVectorBytes);
  result.data = MutableAddress(cache);
  return result;
}

const float* ParseMlaScale(const char* op, const Tensor* scale, MlaFormat format,
                           const phi::Place& place, const MlaNames& names) {
  if (format != MlaFormat::kFp8) {
    if (scale != nullptr) {
      Fail("ValueError", op, names.scale, "expected None for ", NameOf(format), ", got a tensor");
    }
    return nullptr;
  }
  if (scale == nullptr) Fail("TypeError", op, names.scale, "expected a tensor for fp8, got None");
  Arg(op, names.scale, *scale).On(place).Dtype({phi::DataType::FLOAT32}).Dims({1});
  return Data<float>(*scale);
}

namespace {

constexpr const char* kWriteOp = "mla_write_cache";
constexpr const char* kGatherOp = "mla_gather_cache";

// Formats that are read and written.
MlaFormat ParseWrittenFormat(const std::string& name) {
  if (name == NameOf(MlaFormat::kFp8x528)) {
    Fail("NotImplementedError", kWriteOp, "cache_format", "'", name,
         "' is only read; supported: bf16, fp8, fp8_656, fp8_584");
  }
  return ParseMlaFormat(kWriteOp, name);
}

MlaScaleRule ParseScaleRule(const std::string& name, MlaFormat format) {
  if (name == "pow2") return MlaScaleRule::kPow2;
  if (name != "amax") {
    Fail("ValueError", kWriteOp, "scale_rule", "expected pow2 or amax, got '", name, "'");
  }
  if (format != MlaFormat::kFp8x656) {
    Fail("ValueError", kWriteOp, "scale_rule", "amax is for fp8_656, got cache_format '",
         NameOf(format), "'");
  }
  return MlaScaleRule::kAmax;
}

// Checks [T, channels] and returns its token stride.
int64_t CheckTokens(const char* op, const char* name, const Tensor& tensor, int64_t tokens,
                    int64_t channels, const phi::Place& place) {
  Arg(op, name, tensor)
      .On(place)
      .Dtype({phi::DataType::BFLOAT16})
      .Dims({tokens, channels})
      .LastDimContiguous();
  RequireAligned(op, name, tensor, kVectorBytes);
  return tensor.numel() == 0 ? channels : StridesOf(tensor)[0];
}

const int* CheckLengths(const char* name, const Tensor& tensor, int64_t size,
                        const phi::Place& place) {
  Arg(kGatherOp, name, tensor).On(place).Dtype({phi::DataType::INT32}).Dims({size}).Contiguous();
  return Data<int>(tensor);
}

}  // namespace

FASTATTN_OPERATOR(void, kWriteOp, MlaWriteCache, NoResults,
                  (const Strided<Tensor>& latent, const Strided<Tensor>& rope, Tensor& cache,
                   const Tensor& slot_mapping, const OptionalTensor& scale,
                   const std::string& cache_format, const std::string& scale_rule, int page_size)) {
  MlaWriteParams p;
  const MlaFormat format = ParseWrittenFormat(cache_format);
  p.scale_rule = ParseScaleRule(scale_rule, format);
  Arg(kWriteOp, "latent", latent);
  Arg(kWriteOp, "cache", cache);
  const Tensor& anchor = cache.initialized() ? cache : latent;  // empty ones have no place
  const phi::Place place = anchor.place();
  p.cache = ParseMlaCache(kWriteOp, cache, format, page_size, place);
  p.latent_stride = CheckTokens(kWriteOp, "latent", latent, -1, FactsOf(format).latent, place);
  const int64_t tokens = latent.dims()[0];
  p.rope_stride = CheckTokens(kWriteOp, "rope", rope, tokens, kMlaRopeDim, place);
  p.slots = ToIndexArray(kWriteOp, "slot_mapping", slot_mapping, place, -1);
  p.num_slots = slot_mapping.dims()[0];
  if (p.num_slots > tokens) {
    Fail("ValueError", kWriteOp, "slot_mapping", "expected at most ", tokens,
         " slots, the tokens of latent, got ", p.num_slots);
  }
  const Tensor* given = Get(scale);
  p.scale = ParseMlaScale(kWriteOp, given, format, place);
  RequireNoOverlap(kWriteOp, "cache", cache);
  RequireApart(
      kWriteOp, "cache", cache,
      {{"latent", &latent}, {"rope", &rope}, {"slot_mapping", &slot_mapping}, {"scale", given}});
  p.latent = Data<uint16_t>(latent);
  p.rope = Data<uint16_t>(rope);
  if (p.num_slots == 0 || p.cache.num_pages == 0) return;

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(anchor)) {
    LaunchOnGpu(kWriteOp, anchor,
                [&](cudaStream_t stream) { return cuda::LaunchMlaWriteCache(p, stream); });
    return;
  }
#endif
  RequireCpu(kWriteOp, place);
  Guarded(kWriteOp, [&] { cpu::MlaWriteCache(p); });
}

FASTATTN_OPERATOR(void, kGatherOp, MlaGatherCache, NoResults,
                  (const Strided<Tensor>& cache, Tensor& out, const Tensor& block_tables,
                   const Tensor& seq_lens_decoder, const Tensor& cu_seqlens_k,
                   const OptionalTensor& scale, const std::string& cache_format, int page_size)) {
  MlaGatherParams p;
  const MlaFormat format = ParseMlaFormat(kGatherOp, cache_format);
  Arg(kGatherOp, "cache", cache);
  Arg(kGatherOp, "out", out);
  const Tensor& anchor = cache.initialized() ? cache : out;  // empty ones have no place
  const phi::Place place = anchor.place();
  p.cache = ParseMlaCache(kGatherOp, cache, format, page_size, place);
  p.out_stride =
      CheckTokens(kGatherOp, "out", out, -1, FactsOf(format).latent + kMlaRopeDim, place);
  p.num_out_tokens = out.dims()[0];
  Arg(kGatherOp, "block_tables", block_tables)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Rank(2)
      .Contiguous();
  const Sizes table = SizesOf(block_tables);
  for (int64_t size : table) RequireFits(kGatherOp, "block_tables", size);
  p.batch = static_cast<int>(table[0]);
  p.max_blocks = static_cast<int>(table[1]);
  p.block_tables = Data<int>(block_tables);
  p.seq_lens_decoder = CheckLengths("seq_lens_decoder", seq_lens_decoder, table[0], place);
  p.cu_seqlens_k = CheckLengths("cu_seqlens_k", cu_seqlens_k, table[0] + 1, place);
  const Tensor* given = Get(scale);
  p.scale = ParseMlaScale(kGatherOp, given, format, place);
  RequireNoOverlap(kGatherOp, "out", out);
  RequireApart(kGatherOp, "out", out,
               {{"cache", &cache},
                {"block_tables", &block_tables},
                {"seq_lens_decoder", &seq_lens_decoder},
                {"cu_seqlens_k", &cu_seqlens_k},
                {"scale", given}});
  p.out = MutableData<uint16_t>(out);
  const bool nothing = p.num_out_tokens == 0 || p.batch == 0 || p.max_blocks == 0;
  if (nothing || p.cache.num_pages == 0) return;

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(anchor)) {
    LaunchOnGpu(kGatherOp, anchor,
                [&](cudaStream_t stream) { return cuda::LaunchMlaGatherCache(p, stream); });
    return;
  }
#endif
  RequireCpu(kGatherOp, place);
  Guarded(kGatherOp, [&] { cpu::MlaGatherCache(p); });
}

}  // namespace fastattn::api
