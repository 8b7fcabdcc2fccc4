#include "api/paged_cache.h"
#include "common/head_dims.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

namespace fastattn::api {

namespace {

// Dtype of a cache's codes. Every Paddle has uint8 tensors, which may hold any codes; a tensor of
// an 8-bit type of its own must match.
DType ParseCodeDtype(const char* op, const char* name, const Tensor& cache, CacheType type,
                     bool is_value, Fp8Format format) {
  const CacheFormat& known = FormatOf(type);
  if (CodesPerByte(type, is_value) == 2) {
    Arg(op, name, cache).Dtype({phi::DataType::UINT8});
    return CodeOf(type, is_value);
  }
  const DType codes = format == Fp8Format::kE5M2 ? known.other_code : CodeOf(type, is_value);
  const DType given = ToDType(op, name, cache.dtype());
  if (given != DType::kUInt8 && given != codes) {
    Fail("TypeError", op, name, "expected dtype uint8 or ", NameOf(codes), " for ", NameOf(type),
         ", got ", NameOf(given));
  }
  return codes;
}

// `head_dim`: that of K or of V, whose scales they are. `block_heads`: heads in a block.
ScaleScheme ParseScales(const char* op, const char* name, const Tensor* scales,
                        const PagedCache& cache, int64_t head_dim, int64_t block_heads,
                        const phi::Place& place, CacheStrides* strides) {
  // Paddle passes an empty optional tensor as an absent one.
  if (scales == nullptr && IsDynamic(cache.type) && cache.num_blocks == 0) {
    return ScaleScheme::kToken;
  }
  if (scales == nullptr) {
    Fail("ValueError", op, name, "cache_quant_type '", NameOf(cache.type),
         "' needs scales, got None");
  }
  Arg arg(op, name, *scales);
  arg.On(place);
  const CacheFormat& known = FormatOf(cache.type);
  if (known.scheme == ScaleScheme::kGroup) {
    arg.Dtype({phi::DataType::UINT8})
        .Dims({cache.num_blocks, block_heads, kBlockSize, head_dim / InfoOf(known.scales).group});
    *strides = ParseCacheStrides(op, name, *scales, true);
    return ScaleScheme::kToken;
  }
  arg.Dtype({phi::DataType::FLOAT32, phi::DataType::BFLOAT16});
  if (IsDynamic(cache.type)) {
    arg.Dims({cache.num_blocks, block_heads, kBlockSize});
    *strides = ParseCacheStrides(op, name, *scales);
    return ScaleScheme::kToken;
  }
  arg.Contiguous();
  const Sizes shape = SizesOf(*scales);
  const int64_t heads = cache.num_kv_heads;
  const int64_t channels = heads * head_dim;
  if (shape == Sizes{1}) return ScaleScheme::kLayer;
  if (shape == Sizes{heads}) return ScaleScheme::kHead;
  const bool by_channel = known.scheme == ScaleScheme::kChannel;
  if (shape == Sizes{channels} && by_channel) return ScaleScheme::kChannel;
  if (by_channel) {
    Fail("ValueError", op, name, "expected shape [1], [", heads, "] (KV heads) or [", channels,
         "] (KV heads * head_dim), got ", ShapeText(shape));
  }
  Fail("ValueError", op, name, "expected shape [1] or [", heads, "] (KV heads), got ",
       ShapeText(shape));
}

// KV heads of a cache whose blocks have `block_heads` of them.
int64_t KvHeads(const CacheArgs& args, int64_t block_heads) {
  if (block_heads != 1 || args.head_tables == nullptr) return block_heads;
  const common::DDim& tables = args.head_tables->dims();
  return tables.size() == 3 ? std::max<int64_t>(tables[1], 1) : 1;
}

}  // namespace

void RequireFits(const char* op, const char* name, int64_t size) {
  if (size > std::numeric_limits<int>::max()) {
    Fail("ValueError", op, name, "a dimension of ", size, " is too large");
  }
}

CacheType ParseCacheType(const char* op, const std::string& name) {
  for (const CacheFormat& format : kCacheFormats) {
    if (name == format.name) return format.type;
  }
  Fail("NotImplementedError", op, "cache_quant_type", "'", name,
       "' is not supported; supported: ", CacheTypeNames([](const CacheFormat&) { return true; }));
}

Fp8Format ParseFp8Format(const char* op, const std::string& name) {
  if (name == "e4m3") return Fp8Format::kE4M3;
  if (name == "e5m2") return Fp8Format::kE5M2;
  Fail("ValueError", op, "fp8_format", "expected e4m3 or e5m2, got '", name, "'");
}

CacheLayout ParseCacheLayout(const char* op, const char* arg, const std::string& name) {
  if (name == "fastattn") return CacheLayout::kFastattn;
  if (name == "fastdeploy") return CacheLayout::kFastDeploy;
  if (name == "logical") return CacheLayout::kLogical;
  Fail("ValueError", op, arg, "expected fastattn, fastdeploy or logical, got '", name, "'");
}

CacheStrides ParseCacheStrides(const char* op, const char* name, const Tensor& tensor,
                               bool whole_planes) {
  const common::DDim& shape = tensor.dims();
  const common::DDim& given = tensor.strides();
  const int rank = shape.size();
  const auto fail = [&](const char* text) {
    Fail("ValueError", op, name, text, ", got shape ", ShapeText(tensor.shape()), " with strides ",
         ShapeText(StridesOf(tensor)));
  };
  int64_t strides[4] = {};
  int64_t natural = 1;  // of a contiguous tensor
  for (int i = rank - 1; i >= 0; --i) {
    // The stride of a dimension of one entry, or of an empty tensor, means nothing.
    strides[i] = shape[i] == 1 || tensor.numel() == 0 ? natural : given[i];
    if (i == rank - 1 && strides[i] != 1) fail("expected stride 1 in the last dimension");
    if (strides[i] <= 0) fail("expected positive strides");
    if (whole_planes && i == rank - 2 && strides[i] != natural) {
      fail("expected the rows of a block and KV head side by side");
    }
    natural *= shape[i];
  }
  return {strides[0], strides[1], rank == 4 ? strides[2] : 1};
}

PagedCache ParsePagedCache(const char* op, const CacheArgs& args, const phi::Place& place) {
  PagedCache cache;
  cache.type = ParseCacheType(op, args.cache_quant_type);
  cache.layout = args.layout;
  const Fp8Format format = ParseFp8Format(op, args.fp8_format);
  const CacheFormat& known = FormatOf(cache.type);
  if (known.code == DType::kE4M3 && known.other_code == known.code && format != Fp8Format::kE4M3) {
    Fail("NotImplementedError", op, "fp8_format", known.name, " stores e4m3 only, got '",
         args.fp8_format, "'");
  }

  Arg key(op, "key_cache", args.key_cache);
  key.On(place).Rank(4);
  const Sizes shape = SizesOf(args.key_cache);
  for (int64_t size : shape) RequireFits(op, "key_cache", size);
  const int64_t row = shape[3], head_dim = row * KeyCodesPerByte(cache.type);
  if (shape[2] != kBlockSize) {
    Fail("ValueError", op, "key_cache", "expected blocks of ", kBlockSize,
         " tokens, shape [num_blocks, KV, 64, D", KeyCodesPerByte(cache.type) == 2 ? " / 2" : "",
         "], got ", ShapeText(shape));
  }
  if (HasNibbles(cache.type) && cache.layout == CacheLayout::kFastDeploy) {
    Fail("NotImplementedError", op, "cache_layout", "'fastdeploy' has no order for ",
         NameOf(cache.type), "; supported: fastattn");
  }
  // Without this check the error would name the tensors that have the right size.
  if (row != head_dim && row == args.head_dim && AttentionHeadDims::Has(row)) {
    Fail("ValueError", op, "key_cache", "expected D / 2 = ", row / 2, " channels: a byte of ",
         NameOf(cache.type), " holds two of the ", row, " of a head, got ", ShapeText(shape));
  }
  if (!AttentionHeadDims::Has(head_dim)) {
    Fail("NotImplementedError", op, "key_cache", "head_dim ", head_dim,
         " is not supported; supported: ", AttentionHeadDims::Text());
  }
  if (shape[1] == 0) Fail("ValueError", op, "key_cache", "expected at least 1 KV head, got 0");
  cache.num_blocks = static_cast<int>(shape[0]);
  const int64_t heads = KvHeads(args, shape[1]);
  RequireFits(op, "block_tables", heads);
  cache.num_kv_heads = static_cast<int>(heads);
  cache.head_dim = static_cast<int>(head_dim);

  Arg value(op, "value_cache", args.value_cache);
  value.On(place);
  const bool transposed = IsQuantized(cache.type) && cache.layout == CacheLayout::kFastattn;
  const int64_t value_row = cache.ValueElements();  // of a K of so many channels
  value.Dims(transposed ? Shape{shape[0], shape[1], value_row, kBlockSize}
                        : Shape{shape[0], shape[1], kBlockSize, value_row});

  // The fastdeploy layout orders the bytes of a whole plane.
  const bool whole = IsQuantized(cache.type) && cache.layout == CacheLayout::kFastDeploy;
  cache.key_strides = ParseCacheStrides(op, "key_cache", args.key_cache, whole);
  cache.value_strides = ParseCacheStrides(op, "value_cache", args.value_cache, whole);

  if (cache.type == CacheType::kNone) {
    for (const Arg* arg : {&key, &value}) {
      arg->Dtype({phi::DataType::BFLOAT16, phi::DataType::FLOAT16});
    }
    value.Dtype({args.key_cache.dtype()});
    cache.dtype = cache.value_dtype = ToDType(op, "key_cache", args.key_cache.dtype());
    if (args.k_scales != nullptr || args.v_scales != nullptr) {
      Fail("ValueError", op, args.k_scales != nullptr ? "cache_k_scales" : "cache_v_scales",
           "cache_quant_type 'none' takes no scales");
    }
  } else {
    cache.dtype = ParseCodeDtype(op, "key_cache", args.key_cache, cache.type, false, format);
    cache.value_dtype =
        ParseCodeDtype(op, "value_cache", args.value_cache, cache.type, true, format);
    cache.k_granularity = ParseScales(op, "cache_k_scales", args.k_scales, cache, cache.head_dim,
                                      shape[1], place, &cache.k_scale_strides);
    cache.v_granularity = ParseScales(op, "cache_v_scales", args.v_scales, cache, cache.ValueDim(),
                                      shape[1], place, &cache.v_scale_strides);
    if (args.k_scales != nullptr && args.v_scales != nullptr) {
      Arg(op, "cache_v_scales", *args.v_scales).Dtype({args.k_scales->dtype()});
      cache.scale_dtype = ToDType(op, "cache_k_scales", args.k_scales->dtype());
      // Operators that only read a cache never write through these.
      cache.k_scales = MutableAddress(*args.k_scales);
      cache.v_scales = MutableAddress(*args.v_scales);
    }
  }
  cache.key = MutableAddress(args.key_cache);
  cache.value = MutableAddress(args.value_cache);
  if (heads != shape[1]) {  // every head's plane of a block is the only one
    for (CacheStrides* strides : {&cache.key_strides, &cache.value_strides, &cache.k_scale_strides,
                                  &cache.v_scale_strides}) {
      strides->head = 0;
    }
  }
  return cache;
}

void RequireAlignedCache(const char* op, const PagedCache& cache) {
  const auto require = [op](const char* name, const void* data, const CacheStrides& strides,
                            int64_t row, DType dtype) {
    if (reinterpret_cast<uintptr_t>(data) % kVectorBytes != 0) {
      Fail("ValueError", op, name, "expected an address of a multiple of 16 bytes on a GPU");
    }
    if ((strides.block | strides.head | row) * SizeOf(dtype) % kVectorBytes != 0) {
      Fail("ValueError", op, name, "expected strides of a multiple of 16 bytes on a GPU, got ",
           strides.block, ", ", strides.head, " and ", strides.row, " elements");
    }
  };
  require("key_cache", cache.key, cache.key_strides, cache.key_strides.row, cache.dtype);
  require("value_cache", cache.value, cache.value_strides, cache.value_strides.row,
          cache.value_dtype);
  if (IsDynamic(cache.type)) {  // scales have no rows
    require("cache_k_scales", cache.k_scales, cache.k_scale_strides, 0, cache.scale_dtype);
    require("cache_v_scales", cache.v_scales, cache.v_scale_strides, 0, cache.scale_dtype);
  }
}

void RequireCacheApart(const char* op, const CacheArgs& args, CacheType type,
                       const std::vector<NamedTensor>& read) {
  const NamedTensor tensors[] = {{"key_cache", &args.key_cache},
                                 {"value_cache", &args.value_cache},
                                 {"cache_k_scales", args.k_scales},
                                 {"cache_v_scales", args.v_scales}};
  const int num_written = IsDynamic(type) ? 4 : 2;
  std::optional<StridedView> bytes[4];  // of those that have elements
  for (int i = 0; i < 4; ++i) {
    const Tensor* tensor = tensors[i].tensor;
    if (tensor == nullptr || tensor->numel() == 0) continue;
    if (i < num_written) RequireNoOverlap(op, tensors[i].name, *tensor);
    bytes[i] = BytesOf(*tensor);
  }
  constexpr std::pair<int, int> kPairs[] = {{1, 0}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {3, 2}};
  for (const auto& [i, other] : kPairs) {
    if (i < num_written && bytes[i] && bytes[other] && MayOverlap(*bytes[i], *bytes[other])) {
      FailShared(op, tensors[i].name, tensors[other].name);
    }
  }
  for (const auto& [name, tensor] : read) {
    if (tensor == nullptr || tensor->numel() == 0) continue;
    const StridedView other = BytesOf(*tensor);
    for (int i = 0; i < num_written; ++i) {
      if (bytes[i] && MayOverlap(*bytes[i], other)) FailShared(op, tensors[i].name, name);
    }
  }
}

SeqMeta ParseSeqs(const char* op, const Tensor& block_tables, const Tensor& cu_seqlens_q,
                  const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
                  const Tensor* batch_id_per_token, int64_t num_tokens, const phi::Place& place,
                  int64_t table_heads) {
  const Arg given(op, "block_tables", block_tables);
  const bool head_tables = table_heads > 0 && block_tables.dims().size() == 3;
  given.On(place).Dtype({phi::DataType::INT32}).Rank(head_tables ? 3 : 2).Contiguous();
  const Sizes tables = SizesOf(block_tables);
  const int64_t slots = tables[0];
  for (int64_t size : tables) RequireFits(op, "block_tables", size);
  if (head_tables && tables[1] != table_heads) {
    Fail("ValueError", op, "block_tables", "expected shape [sequences, ", table_heads,
         " (KV heads), max_blocks], got ", ShapeText(tables));
  }
  RequireFits(op, "num_tokens", num_tokens);

  // A server may pass the block tables and cached lengths of all its slots, of which the first run.
  Arg(op, "seq_lens_this_time", seq_lens_this_time);
  const Sizes running = SizesOf(seq_lens_this_time);
  const int64_t batch = running.empty() ? slots : std::min(running[0], slots);
  const auto lengths = [&](const char* name, const Tensor& tensor, int64_t size) {
    return ParseLengths(op, name, tensor, size, place, " (block_tables has ", slots,
                        " sequences, seq_lens_this_time ", batch, ")");
  };
  SeqMeta seqs;
  seqs.batch = static_cast<int>(batch);
  seqs.max_blocks = static_cast<int>(tables[tables.size() - 1]);
  seqs.num_tokens = static_cast<int>(num_tokens);
  seqs.head_tables = head_tables;
  seqs.block_tables = Data<int>(block_tables);
  seqs.cu_seqlens_q = lengths("cu_seqlens_q", cu_seqlens_q, batch + 1);
  seqs.seq_lens_decoder = lengths("seq_lens_decoder", seq_lens_decoder, slots);
  seqs.seq_lens_this_time = lengths("seq_lens_this_time", seq_lens_this_time, batch);
  if (batch_id_per_token != nullptr) {
    seqs.batch_id_per_token = lengths("batch_id_per_token", *batch_id_per_token, num_tokens);
  }
  return seqs;
}

void RequireGridOfTokens(const char* op, const SeqMeta& seqs) {
  constexpr int kMostTokens = 65535;  // a grid's second dimension
  if (seqs.head_tables && seqs.num_tokens > kMostTokens) {
    Fail("NotImplementedError", op, "block_tables", "a table for each KV head is supported for up ",
         "to ", kMostTokens, " tokens on a GPU, got ", seqs.num_tokens);
  }
}

int64_t HeadsContiguous(const char* op, const char* name, const Tensor& tensor) {
  const Sizes shape = SizesOf(tensor);
  const Sizes strides = StridesOf(tensor);
  if (tensor.numel() > 0 && (strides[2] != 1 || (shape[1] != 1 && strides[1] != shape[2]))) {
    Fail("ValueError", op, name, "expected the heads of a token side by side, got shape ",
         ShapeText(shape), " with strides ", ShapeText(strides));
  }
  return strides[0];
}

}  // namespace fastattn::api
