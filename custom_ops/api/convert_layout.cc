#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/paged_cache.h"
#include "cpu/convert_layout.h"
#include "params/cache.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/convert_layout/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "convert_cache_layout";

bool ParseKind(const std::string& kind) {
  if (kind == "v") return true;
  if (kind == "k") return false;
  Fail("ValueError", kOp, "kind", "expected k or v, got '", kind, "'");
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

Conversion Parse(const std::string& kind, const std::string& cache_quant_type,
                 const std::string& src, const std::string& dst) {
  return {ParseCacheType(kOp, cache_quant_type), ParseKind(kind), ParseCacheLayout(kOp, "src", src),
          ParseCacheLayout(kOp, "dst", dst)};
}

Shape OutputShape(const Shape& shape, const Conversion& conversion) {
  if (shape.size() != 4) {
    Fail("ValueError", kOp, "cache", "expected 4 dimensions, got shape ", ShapeText(shape));
  }
  const bool before = IsTransposed(conversion.type, conversion.is_value, conversion.src);
  const bool after = IsTransposed(conversion.type, conversion.is_value, conversion.dst);
  return before == after ? shape : Shape{shape[0], shape[1], shape[3], shape[2]};
}

}  // namespace

std::vector<Tensor> ConvertCacheLayout(const Tensor& cache, const std::string& kind,
                                       const std::string& cache_quant_type, const std::string& src,
                                       const std::string& dst) {
  const Conversion conversion = Parse(kind, cache_quant_type, src, dst);
  Arg arg(kOp, "cache", cache);
  arg.Rank(4).Contiguous();
  const Shape shape = cache.shape();
  const bool transposed = IsTransposed(conversion.type, conversion.is_value, conversion.src);
  const int64_t tokens = shape[transposed ? 3 : 2];
  const int64_t head_dim = shape[transposed ? 2 : 3];
  if (tokens != kBlockSize) {
    Fail("ValueError", kOp, "cache", "expected blocks of ", kBlockSize, " tokens, shape [",
         transposed ? "num_blocks, KV, D, 64" : "num_blocks, KV, 64, D", "] for kind '", kind,
         "' in layout '", src, "', got ", ShapeText(shape));
  }
  if (head_dim != 64 && head_dim != 128) {
    Fail("NotImplementedError", kOp, "cache", "head_dim ", head_dim,
         " is not supported; supported: 64, 128");
  }
  const DType dtype = ToDType(kOp, "cache", cache.dtype());
  const bool fits = conversion.type == CacheType::kNone
                        ? dtype == DType::kBFloat16 || dtype == DType::kFloat16
                    : IsInt8(conversion.type)
                        ? dtype == DType::kUInt8 || dtype == DType::kInt8
                        : dtype == DType::kUInt8 || dtype == DType::kE4M3 || dtype == DType::kE5M2;
  if (!fits) {
    Fail("TypeError", kOp, "cache", "expected dtype ",
         conversion.type == CacheType::kNone ? "bfloat16 or float16"
         : IsInt8(conversion.type)           ? "uint8 or int8"
                                             : "uint8, float8_e4m3fn or float8_e5m2",
         " for ", NameOf(conversion.type), ", got ", NameOf(dtype));
  }
  Tensor out = paddle::empty(OutputShape(shape, conversion), cache.dtype(), cache.place());

  ConvertLayoutParams p;
  p.src = Data(cache);
  p.dst = MutableData(out);
  p.src_layout = conversion.src;
  p.dst_layout = conversion.dst;
  p.type = conversion.type;
  p.is_value = conversion.is_value;
  p.num_block_heads = shape[0] * shape[1];
  p.head_dim = static_cast<int>(head_dim);

#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(cache)) {
    LaunchOnGpu(kOp, cache,
                [&](cudaStream_t stream) { return cuda::LaunchConvertLayout(p, stream); });
    return {out};
  }
#endif
  RequireCpu(kOp, cache.place());
  Guarded(kOp, [&] { cpu::ConvertLayout(p); });
  return {out};
}

std::vector<Shape> ConvertCacheLayoutInferShape(const Shape& cache, const std::string& kind,
                                                const std::string& cache_quant_type,
                                                const std::string& src, const std::string& dst) {
  return Inferred<Shape>({cache}, [&]() -> std::vector<Shape> {
    return {OutputShape(cache, Parse(kind, cache_quant_type, src, dst))};
  });
}

std::vector<phi::DataType> ConvertCacheLayoutInferDtype(const phi::DataType& cache,
                                                        const std::string& kind,
                                                        const std::string& cache_quant_type,
                                                        const std::string& src,
                                                        const std::string& dst) {
  return {cache};
}

}  // namespace fastattn::api

PD_BUILD_OP(fastattn_convert_cache_layout)
    .Inputs({"cache"})
    .Outputs({"out"})
    .Attrs({"kind: std::string", "cache_quant_type: std::string", "src: std::string",
            "dst: std::string"})
    .SetKernelFn(PD_KERNEL(fastattn::api::ConvertCacheLayout))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::ConvertCacheLayoutInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::ConvertCacheLayoutInferDtype));
