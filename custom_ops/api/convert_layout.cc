#include <limits>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "common/head_dims.h"
#include "cpu/convert_layout.h"
#include "params/cache.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/cache/convert/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "convert_cache_layout";
constexpr const char* kInPlaceOp = "convert_cache_blocks";

bool ParseKind(const char* op, const std::string& kind) {
  if (kind == "v") return true;
  if (kind == "k") return false;
  Fail("ValueError", op, "kind", "expected k or v, got '", kind, "'");
}

// Whether the tokens of a channel lie together: the last two dimensions are [D, 64].
bool IsTransposed(CacheType type, bool is_value, CacheLayout layout) {
  return IsQuantized(type) && is_value && layout == CacheLayout::kFastattn;
}

struct Conversion {
  CacheType type;
  bool is_value;
  CacheLayout src;
  CacheLayout dst;
};

Conversion Parse(const char* op, const std::string& kind, const std::string& cache_quant_type,
                 const std::string& src, const std::string& dst) {
  const Conversion found{ParseCacheType(op, cache_quant_type), ParseKind(op, kind),
                         ParseCacheLayout(op, "src", src), ParseCacheLayout(op, "dst", dst)};
  const bool fastdeploy =
      found.src == CacheLayout::kFastDeploy || found.dst == CacheLayout::kFastDeploy;
  if (HasNibbles(found.type) && fastdeploy) {
    Fail("NotImplementedError", op, found.src == CacheLayout::kFastDeploy ? "src" : "dst",
         "'fastdeploy' has no order for ", NameOf(found.type), "; supported: fastattn, logical");
  }
  return found;
}

Shape OutputShape(const Shape& shape, const Conversion& conversion) {
  if (shape.size() != 4) {
    Fail("ValueError", kOp, "cache", "expected 4 dimensions, got shape ", ShapeText(shape));
  }
  const bool before = IsTransposed(conversion.type, conversion.is_value, conversion.src);
  const bool after = IsTransposed(conversion.type, conversion.is_value, conversion.dst);
  return before == after ? shape : Shape{shape[0], shape[1], shape[3], shape[2]};
}

// Checks `cache` and fills everything but the addresses. `transposed`: its shape ends in [D, 64].
ConvertLayoutParams ParseCache(const char* op, const Tensor& cache, const Conversion& conversion,
                               bool transposed, const std::string& expected) {
  Arg(op, "cache", cache).Rank(4);
  RequireAligned(op, "cache", cache, kVectorBytes);
  const Shape shape = cache.shape();
  for (int64_t size : shape) RequireFits(op, "cache", size);
  const int64_t tokens = shape[transposed ? 3 : 2];
  const int64_t row = shape[transposed ? 2 : 3];
  const int64_t head_dim = row * CodesPerByte(conversion.type, conversion.is_value);
  if (tokens != kBlockSize) {
    Fail("ValueError", op, "cache", "expected blocks of ", kBlockSize, " tokens, shape ", expected,
         ", got ", ShapeText(shape));
  }
  // Heads of K have 192 channels where those of V have 128.
  const bool whole = ValueDim(static_cast<int>(head_dim)) == head_dim;
  if (!AttentionHeadDims::Has(head_dim) || (conversion.is_value && !whole)) {
    Fail("NotImplementedError", op, "cache", "head_dim ", head_dim,
         " is not supported; supported: ",
         conversion.is_value ? HeadDims::Text() : AttentionHeadDims::Text());
  }
  const DType dtype = ToDType(op, "cache", cache.dtype());
  const DType code = CodeOf(conversion.type, conversion.is_value);
  const bool nibbles = CodesPerByte(code) == 2;
  const bool fits = conversion.type == CacheType::kNone
                        ? dtype == DType::kBFloat16 || dtype == DType::kFloat16
                    : dtype == DType::kUInt8 ? true
                    : nibbles                ? false
                    : code == DType::kE4M3   ? dtype == DType::kE4M3 || dtype == DType::kE5M2
                                             : dtype == code;
  if (!fits) {
    Fail("TypeError", op, "cache", "expected dtype ",
         conversion.type == CacheType::kNone ? "bfloat16 or float16"
         : nibbles                           ? "uint8"
         : code == DType::kInt8              ? "uint8 or int8"
                                             : "uint8, float8_e4m3fn or float8_e5m2",
         " for ", NameOf(conversion.type), ", got ", NameOf(dtype));
  }
  ConvertLayoutParams p;
  p.src_layout = conversion.src;
  p.dst_layout = conversion.dst;
  p.type = conversion.type;
  p.is_value = conversion.is_value;
  p.num_planes = CheckedProduct(op, "cache", {shape[0], shape[1]});
  p.num_kv_heads = static_cast<int>(shape[1]);
  p.src_strides = ParseCacheStrides(op, "cache", cache, true);
  p.row_elements = static_cast<int>(row);
  return p;
}

void Run(const char* op, const Tensor& cache, const ConvertLayoutParams& p) {
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cache)) {
    LaunchOnGpu(op, cache,
                [&](cudaStream_t stream) { return cuda::LaunchConvertLayout(p, stream); });
    return;
  }
#endif
  RequireCpu(op, cache.place());
  Guarded(op, [&] { cpu::ConvertLayout(p); });
}

Results ConvertResults(const Known& in) {
  const KnownInput& cache = in["cache"];
  const Shape shape = Inferred(cache.shape, [&] {
    return OutputShape(cache.shape, Parse(kOp, in.Text("kind"), in.Text("cache_quant_type"),
                                          in.Text("src"), in.Text("dst")));
  });
  return {{"out", shape, cache.dtype}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, ConvertCacheLayout, ConvertResults,
                  (const Strided<Tensor>& cache, const std::string& kind,
                   const std::string& cache_quant_type, const std::string& src,
                   const std::string& dst)) {
  const Conversion conversion = Parse(kOp, kind, cache_quant_type, src, dst);
  const bool transposed = IsTransposed(conversion.type, conversion.is_value, conversion.src);
  const std::string expected =
      std::string(transposed ? "[num_blocks, KV, D, 64]" : "[num_blocks, KV, 64, D]") +
      " for kind '" + kind + "' in layout '" + src + "'";
  ConvertLayoutParams p = ParseCache(kOp, cache, conversion, transposed, expected);
  Tensor out = paddle::empty(OutputShape(cache.shape(), conversion), cache.dtype(), cache.place());
  p.src = Data(cache);
  p.dst = MutableData(out);
  const int64_t plane = int64_t{kBlockSize} * p.row_elements;
  p.dst_strides = {plane * p.num_kv_heads, plane, 0};
  Run(kOp, cache, p);
  return {out};
}

// Converts in place. A V cache of which only some blocks are converted may have either shape.
FASTATTN_OPERATOR(void, kInPlaceOp, ConvertCacheBlocks, NoResults,
                  (Tensor & cache, const std::string& kind, const std::string& cache_quant_type,
                   const std::string& src, const std::string& dst, int64_t begin, int64_t end)) {
  const Conversion conversion = Parse(kInPlaceOp, kind, cache_quant_type, src, dst);
  Arg(kInPlaceOp, "cache", cache).Rank(4);
  const Shape shape = cache.shape();
  const bool may_transpose = conversion.is_value && IsQuantized(conversion.type);
  const bool transposed = may_transpose && shape[2] != kBlockSize;
  ConvertLayoutParams p =
      ParseCache(kInPlaceOp, cache, conversion, transposed,
                 may_transpose ? "[num_blocks, KV, 64, D] or [num_blocks, KV, D, 64]"
                               : "[num_blocks, KV, 64, D]");
  if (end == std::numeric_limits<int64_t>::max()) end = shape[0];  // all blocks
  if (begin < 0 || begin > end || end > shape[0]) {
    Fail("ValueError", kInPlaceOp, begin < 0 || begin > end ? "begin" : "end",
         "expected 0 <= begin <= end <= ", shape[0], " (num_blocks), got begin ", begin, ", end ",
         end);
  }
  if (begin == end || cache.numel() == 0) return;
  RequireNoOverlap(kInPlaceOp, "cache", cache);
  const int element = IsQuantized(conversion.type) ? 1 : SizeOf(DType::kBFloat16);
  p.dst = MutableData<uint8_t>(cache) +
          CheckedProduct(kInPlaceOp, "cache", {begin, p.src_strides.block, element});
  p.src = p.dst;
  p.dst_strides = p.src_strides;
  p.num_planes = CheckedProduct(kInPlaceOp, "cache", {end - begin, shape[1]});
  Run(kInPlaceOp, cache, p);
}

}  // namespace fastattn::api
