#include "cpu/mla_sparse_attention.h"

#include <string>
#include <vector>

#include "api/check.h"
#include "api/device.h"
#include "api/mla_arguments.h"
#include "api/mla_cache.h"
#include "api/operator.h"
#include "api/paged_cache.h"
#include "api/softmax_scale.h"

#if defined(FASTATTN_WITH_CUDA)
#include "cuda/mla/sparse_attention/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kOp = "mla_sparse_attention";

// One cache with the keys that are selected from it.
struct SelectionArgs {
  const Tensor* cache;
  const Tensor* indices;
  const Tensor* lengths;
  const Tensor* scale;
  const std::string& format;
  int page_size;
};

struct SelectionNames {
  MlaNames cache;
  const char* indices;
  const char* lengths;
};

constexpr SelectionNames kKeys = {{}, "indices", "topk_length"};
constexpr SelectionNames kExtra = {
    {"extra_cache", "extra_cache_format", "extra_page_size", "extra_scale"},
    "extra_indices",
    "extra_topk_length"};

// Channels of a key; bf16 rows have those of the query.
int DimOf(MlaFormat format, int dim) {
  return format == MlaFormat::kBf16 ? dim : FactsOf(format).latent + kMlaRopeDim;
}

void ParseQuery(const Tensor& q, const phi::Place& place, MlaSparseParams* p) {
  Arg(kOp, "q", q).On(place).Dtype({phi::DataType::BFLOAT16}).Rank(3).LastDimContiguous();
  RequireAligned(kOp, "q", q, kVectorBytes);
  const Sizes shape = SizesOf(q);
  if (shape[2] != 576 && shape[2] != 512) {
    Fail("ValueError", kOp, "q", "expected 576 or 512 channels, got shape ", ShapeText(shape));
  }
  p->heads = ParseMlaHeads(kOp, shape);
  RequireFits(kOp, "q", CheckedProduct(kOp, "q", {shape[0], shape[1]}));
  p->tokens = shape[0];
  p->dim = static_cast<int>(shape[2]);
  if (q.numel() == 0) return;
  const Sizes strides = StridesOf(q);
  p->q = Data<uint16_t>(q);
  p->q_token_stride = strides[0];
  p->q_head_stride = strides[1];
}

MlaSelection ParseSelection(const SelectionArgs& args, const SelectionNames& names,
                            const phi::Place& place, const MlaSparseParams& p) {
  MlaSelection result;
  const MlaFormat format = ParseMlaFormat(kOp, args.format, names.cache);
  if (DimOf(format, p.dim) != p.dim) {
    Fail("ValueError", kOp, "q", "expected ", DimOf(format, p.dim), " channels, those of ",
         names.cache.format, " ", args.format, ", got ", p.dim);
  }
  result.cache = ParseMlaCache(kOp, *args.cache, format, args.page_size, place, names.cache, p.dim);
  result.scale = ParseMlaScale(kOp, args.scale, format, place, names.cache);
  if (args.lengths != nullptr) {
    Arg(kOp, names.lengths, *args.lengths)
        .On(place)
        .Dtype({phi::DataType::INT32})
        .Dims({p.tokens})
        .Contiguous();
    result.lengths = Data<int>(*args.lengths);
  }
  if (args.indices == nullptr) return result;
  Arg(kOp, names.indices, *args.indices)
      .On(place)
      .Dtype({phi::DataType::INT32})
      .Dims({p.tokens, -1})
      .LastDimContiguous();
  const int64_t topk = args.indices->dims()[1];
  // Kernels round it up to tiles.
  if (topk > int64_t{1} << 30) {
    Fail("ValueError", kOp, names.indices, "expected at most 2^30 a query, got ", topk);
  }
  result.topk = static_cast<int>(topk);
  result.indices = Data<int>(*args.indices);
  result.index_stride = args.indices->numel() == 0 ? 0 : StridesOf(*args.indices)[0];
  return result;
}

// The second cache, if there is one. Paddle hands tensors without elements over as absent ones, so
// that indices which are not here may have been [T, 0]: they name nothing.
MlaSelection ParseExtra(const SelectionArgs& args, const phi::Place& place,
                        const MlaSparseParams& p) {
  ParseMlaFormat(kOp, args.format, kExtra.cache);
  if (args.cache != nullptr) {
    const MlaSelection result = ParseSelection(args, kExtra, place, p);
    return result.topk == 0 ? MlaSelection{} : result;
  }
  const NamedTensor others[] = {{kExtra.indices, args.indices},
                                {kExtra.lengths, args.lengths},
                                {kExtra.cache.scale, args.scale}};
  for (const auto& [name, tensor] : others) {
    if (tensor != nullptr) {
      Fail("ValueError", kOp, name, "expected None without extra_cache, got a tensor");
    }
  }
  return {};
}

void Run(const MlaSparseParams& p, const Tensor& anchor) {
  if (p.tokens == 0) return;
#if defined(FASTATTN_WITH_CUDA)
  if (OnGpu(anchor)) {
    Tensor workspace;
    {
      const DeviceGuard guard(kOp, anchor.place().GetDeviceId());
      const int64_t bytes = cuda::MlaSparseWorkspaceBytes(p);
      if (bytes > 0) workspace = paddle::empty({bytes}, phi::DataType::UINT8, anchor.place());
    }
    void* memory = workspace.defined() ? workspace.data() : nullptr;
    LaunchOnGpu(kOp, anchor,
                [&](cudaStream_t stream) { return cuda::LaunchMlaSparse(p, memory, stream); });
    return;
  }
#endif
  RequireCpu(kOp, anchor.place());
  Guarded(kOp, [&] { cpu::MlaSparseAttention(p); });
}

Results SparseResults(const Known& in) {
  const int64_t tokens = in["q"].size(0), heads = in["q"].size(1);
  const Shape rows = in.Flag("flash_mla") ? Shape{tokens, heads} : Shape{heads, tokens};
  return {{"result", {tokens, heads, kMlaValueDim}, MlaOutDtype(in.Text("out_dtype"))},
          {"softmax_lse", in.Flag("return_softmax_lse") ? rows : Shape{1}, phi::DataType::FLOAT32},
          {"max_logits", in.Flag("return_max_logits") ? rows : Shape{1}, phi::DataType::FLOAT32}};
}

}  // namespace

FASTATTN_OPERATOR(Outputs, kOp, MlaSparseAttention, SparseResults,
                  (const Strided<Tensor>& q, const Strided<Tensor>& cache,
                   const Strided<Tensor>& indices, const OptionalTensor& topk_length,
                   const OptionalTensor& scale, const Strided<OptionalTensor>& extra_cache,
                   const Strided<OptionalTensor>& extra_indices,
                   const OptionalTensor& extra_topk_length, const OptionalTensor& extra_scale,
                   const OptionalTensor& sinks, OptionalTensor& out,
                   const std::string& cache_format, const std::string& extra_cache_format,
                   int page_size, int extra_page_size, float softmax_scale, bool return_softmax_lse,
                   bool return_max_logits, bool flash_mla, const std::string& out_dtype)) {
  MlaSparseParams p;
  Arg(kOp, "q", q);
  Arg(kOp, "cache", cache);
  Arg(kOp, "indices", indices);
  const Tensor& anchor = q.numel() > 0 ? q : cache;  // empty ones have no place
  const phi::Place place = anchor.place();
  ParseQuery(q, place, &p);
  p.keys = ParseSelection({&cache, &indices, Get(topk_length), Get(scale), cache_format, page_size},
                          kKeys, place, p);
  p.extra = ParseExtra({Get(extra_cache), Get(extra_indices), Get(extra_topk_length),
                        Get(extra_scale), extra_cache_format, extra_page_size},
                       place, p);
  p.sinks = ParseMlaSinks(kOp, Get(sinks), p.heads, place);
  p.softmax_scale = ParseSoftmaxScale(kOp, softmax_scale, p.dim);
  p.flash_mla = flash_mla;
  Tensor result = ParseMlaOut(kOp, Get(out), out_dtype, {p.tokens, p.heads, kMlaValueDim}, place,
                              {{"q", &q},
                               {"cache", &cache},
                               {"indices", &indices},
                               {"topk_length", Get(topk_length)},
                               {"scale", Get(scale)},
                               {"extra_cache", Get(extra_cache)},
                               {"extra_indices", Get(extra_indices)},
                               {"extra_topk_length", Get(extra_topk_length)},
                               {"extra_scale", Get(extra_scale)},
                               {"sinks", Get(sinks)}},
                              &p.out, &p.out_float);
  Tensor lse, max_logits;  // undefined unless asked for
  const auto make = [&](Tensor* tensor) {
    const std::vector<int64_t> sizes = flash_mla ? std::vector<int64_t>{p.tokens, p.heads}
                                                 : std::vector<int64_t>{p.heads, p.tokens};
    *tensor = paddle::empty(sizes, phi::DataType::FLOAT32, place);
    return MutableData<float>(*tensor);
  };
  if (return_softmax_lse) p.lse = make(&lse);
  if (return_max_logits) p.max_logits = make(&max_logits);
  Run(p, anchor);
  return {result, lse, max_logits};
}

}  // namespace fastattn::api
