#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/direct.h"
#include "api/paged_cache.h"
#include "api/quantize_query.h"
#include "cpu/attention.h"
#include "cpu/quantize_query.h"
#include "params/attention.h"
#include "params/attention_plan.h"
#if defined(FASTATTN_WITH_CUDA)
#include "api/device.h"
#include "cuda/attention/launch.h"
#include "cuda/attention/quantize_q/launch.h"
#endif

namespace fastattn::api {

namespace {

constexpr const char* kFlash = "flash_attention";
constexpr const char* kPaged = "paged_attention";

// What both operators take beside their keys and values.
struct CommonArgs {
  const Tensor& q;
  const Tensor* q_descale;
  const Tensor* sinks;
  const Tensor* mask_offsets;
  const Tensor* out_scale;
  const Tensor* out;
  const std::string& out_dtype;
  double softmax_scale;
  double softcap;
  bool causal;
  int64_t window_left;
  int64_t window_right;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  bool return_softmax_lse;
  bool quantize_q;
};

int WindowSide(const char* op, int64_t side) {
  if (side < -1) {
    Fail("ValueError", op, "window_size", "expected -1 (unlimited) or at least 0, got ", side);
  }
  // No row is so long: what its lengths then say is cut at other places by every kernel.
  constexpr int64_t kUnlimited = int64_t{1} << 29;
  return side < kUnlimited ? static_cast<int>(side) : -1;
}

int MaxSeqlen(const char* op, const char* name, int64_t length) {
  if (length < 0) Fail("ValueError", op, name, "expected at least 0, got ", length);
  return static_cast<int>(std::min<int64_t>(length, std::numeric_limits<int>::max()));
}

void ParseQuery(const char* op, const Tensor& q, AttentionParams* p) {
  const Arg arg(op, "q", q);
  arg.Rank(3).LastDimContiguous();
  p->q_dtype = ToDType(op, "q", q.dtype());
  if (p->q_dtype == DType::kUInt8) p->q_dtype = DType::kE4M3;
  if (p->q_dtype == DType::kInt8 || p->q_dtype == DType::kE5M2) {
    Fail("TypeError", op, "q", "expected dtype float32, float16, bfloat16, uint8 (e4m3 codes) or ",
         "float8_e4m3fn, got ", q.dtype());
  }
  const Sizes shape = SizesOf(q), strides = StridesOf(q);
  for (int64_t size : shape) RequireFits(op, "q", size);
  p->q = Data(q);
  p->num_heads = static_cast<int>(shape[1]);
  p->head_dim = static_cast<int>(shape[2]);
  p->q_token_stride = strides[0];
  p->q_head_stride = strides[1];
}

void CheckHeads(const char* op, const char* keys, int64_t kv_heads, int64_t head_dim,
                AttentionParams* p) {
  RequireFits(op, keys, kv_heads);
  if (head_dim != p->head_dim) {
    Fail("ValueError", op, keys, "expected head_dim ", p->head_dim, " as q has, got ", head_dim);
  }
  if (kv_heads == 0 || p->num_heads % kv_heads != 0) {
    Fail("ValueError", op, "q", "expected a multiple of the ", kv_heads, " KV heads, got ",
         p->num_heads, " heads");
  }
  if (head_dim != 64 && head_dim != 128) {
    Fail("NotImplementedError", op, "q", "head_dim ", head_dim,
         " is not supported; supported: 64, 128");
  }
  p->num_kv_heads = static_cast<int>(kv_heads);
}

// Fills the scale from a tensor whose shape says what it is constant over.
Descale ParseDescale(const char* op, const char* name, const Tensor& scale, const phi::Place& place,
                     int64_t batch, int64_t kv_heads) {
  Arg(op, name, scale).On(place).Dtype({phi::DataType::FLOAT32, phi::DataType::BFLOAT16});
  const Sizes shape = SizesOf(scale), strides = StridesOf(scale);
  Descale result;
  result.data = Data(scale);
  result.dtype = ToDType(op, name, scale.dtype());
  if (shape == Sizes{batch, kv_heads}) {
    result.batch_stride = strides[0];
    result.head_stride = strides[1];
  } else if (shape == Sizes{kv_heads}) {
    result.head_stride = strides[0];
  } else if (shape != Sizes{1}) {
    Fail("ValueError", op, name, "expected shape [1], [", kv_heads, "] (KV heads) or [", batch,
         ", ", kv_heads, "] (rows, KV heads), got ", ShapeText(shape));
  }
  return result;
}

void ParseQueryDescale(const char* op, const Tensor* scale, const phi::Place& place,
                       AttentionParams* p) {
  if (scale == nullptr) return;
  if (p->q_dtype != DType::kE4M3) {
    Fail("ValueError", op, "q_descale", "expected None for ", NameOf(p->q_dtype),
         " queries; it belongs to e4m3 codes");
  }
  const Arg arg(op, "q_descale", *scale);
  const Sizes shape = SizesOf(*scale);
  const int64_t tokens = p->seqs.num_tokens, heads = p->num_heads;
  if (shape == Sizes{tokens, heads}) {
    arg.On(place).Dtype({phi::DataType::FLOAT32, phi::DataType::BFLOAT16});
    const Sizes strides = StridesOf(*scale);
    p->q_descale.data = Data(*scale);
    p->q_descale.dtype = ToDType(op, "q_descale", scale->dtype());
    p->q_descale.token_stride = strides[0];
    p->q_descale.head_stride = strides[1];
    p->q_descale.per_query_head = true;
    return;
  }
  if (shape != Sizes{1} && shape != Sizes{p->seqs.batch, p->num_kv_heads}) {
    Fail("ValueError", op, "q_descale", "expected shape [1], [", p->seqs.batch, ", ",
         p->num_kv_heads, "] (rows, KV heads) or [", tokens, ", ", heads,
         "] (tokens, query heads), got ", ShapeText(shape));
  }
  p->q_descale = ParseDescale(op, "q_descale", *scale, place, p->seqs.batch, p->num_kv_heads);
}

DType OutputType(const char* op, const CommonArgs& args, const AttentionParams& p) {
  const std::string& name = args.out_dtype;
  if (name != "auto" && name != "float32" && name != "float16" && name != "bfloat16") {
    Fail("ValueError", op, "out_dtype", "expected auto, float32, float16 or bfloat16, got '", name,
         "'");
  }
  const bool codes = p.q_dtype == DType::kE4M3;
  if (args.out_scale != nullptr) {
    if (name != "auto") {
      Fail("ValueError", op, "out_dtype", "expected auto with out_scale (e4m3 codes), got ", name);
    }
    return DType::kE4M3;
  }
  DType dtype = codes ? DType::kBFloat16 : p.q_dtype;
  for (DType known : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == NameOf(known)) dtype = known;
  }
  // fp32 of 16-bit queries: partial results that are merged later.
  if (!codes && dtype != p.q_dtype && dtype != DType::kFloat32) {
    Fail("TypeError", op, "out_dtype", "expected ", NameOf(p.q_dtype),
         " as q has, or float32, got ", name);
  }
  // A given tensor decides for e4m3 queries when nothing else does.
  if (args.out == nullptr || !args.out->defined()) return dtype;
  const DType given = ToDType(op, "out", args.out->dtype());
  const bool free =
      codes && name == "auto" && (given == DType::kFloat16 || given == DType::kFloat32);
  return free ? given : dtype;
}

// Checks what both operators take; p holds queries, rows and head counts already.
void ParseCommon(const char* op, const CommonArgs& args, const phi::Place& place,
                 AttentionParams* p) {
  const int64_t tokens = p->seqs.num_tokens, heads = p->num_heads;
  if (args.quantize_q) CheckQuantizeQuery(op, args.q_descale, *p);
  ParseQueryDescale(op, args.q_descale, place, p);
  if (args.sinks != nullptr) {
    Arg(op, "sinks", *args.sinks)
        .On(place)
        .Dtype({phi::DataType::FLOAT32, phi::DataType::BFLOAT16})
        .Dims({heads})
        .Contiguous();
    p->sinks = Data(*args.sinks);
    p->sinks_dtype = ToDType(op, "sinks", args.sinks->dtype());
  }
  if (args.mask_offsets != nullptr) {
    Arg(op, "mask_offsets", *args.mask_offsets)
        .On(place)
        .Dtype({phi::DataType::INT32})
        .Dims({tokens, 2})
        .Contiguous();
    p->mask_offsets = Data<int>(*args.mask_offsets);
  }
  if (args.out_scale != nullptr) {
    Arg(op, "out_scale", *args.out_scale).On(place).Dtype({phi::DataType::FLOAT32}).Dims({1});
    p->out_scale = Data<float>(*args.out_scale);
  }
  if (!std::isfinite(args.softmax_scale)) {
    Fail("ValueError", op, "softmax_scale", "expected a finite number, got ", args.softmax_scale);
  }
  if (!std::isfinite(args.softcap) || args.softcap < 0) {
    Fail("ValueError", op, "softcap", "expected a finite number of at least 0, got ", args.softcap);
  }
  p->softmax_scale = static_cast<float>(args.softmax_scale);
  p->softcap = static_cast<float>(args.softcap);
  p->causal = args.causal;
  p->window_left = WindowSide(op, args.window_left);
  p->window_right = WindowSide(op, args.window_right);
  p->max_seqlen_q = MaxSeqlen(op, "max_seqlen_q", args.max_seqlen_q);
  p->max_seqlen_k = MaxSeqlen(op, "max_seqlen_k", args.max_seqlen_k);
  p->out_dtype = OutputType(op, args, *p);
  if (args.out != nullptr) {
    const Arg arg(op, "out", *args.out);
    arg.On(place).Dims(args.q.shape()).Contiguous();
    if (p->out_dtype == DType::kE4M3) {
      const DType given = ToDType(op, "out", args.out->dtype());
      if (given != DType::kUInt8 && given != DType::kE4M3) {
        Fail("TypeError", op, "out", "expected dtype uint8 or float8_e4m3fn with out_scale, got ",
             args.out->dtype());
      }
    } else {
      arg.Dtype({ToPhi(p->out_dtype)});
    }
    RequireSameOrApart(op, "out", *args.out, "q", args.q);  // kernels read before they write
    RequireApart(op, "out", *args.out,
                 {{"q_descale", args.q_descale},
                  {"sinks", args.sinks},
                  {"mask_offsets", args.mask_offsets},
                  {"out_scale", args.out_scale}});
  }
}

#if defined(FASTATTN_WITH_CUDA)

// Tokens of no row are cleared by the kernels, as no memory operation is launched beside them.
void RunOnGpu(const char* op, const phi::Place& place, const Tensor& out,
              const QuantizeQueryParams& query, AttentionParams* p) {
  const DType keys = p->paged ? p->cache.dtype : p->ragged.dtype;
  if (p->q_dtype == DType::kFloat32) {
    Fail("NotImplementedError", op, "q", "float32 queries have no CUDA kernel in this build");
  }
  RequireFits(op, "q", static_cast<int64_t>(p->seqs.num_tokens) * p->num_heads);
  // The kernels read four channels of a query at once.
  const int64_t piece = 4 * SizeOf(p->q_dtype);
  if (p->q_token_stride % 4 != 0 || p->q_head_stride % 4 != 0 ||
      reinterpret_cast<uintptr_t>(p->q) % piece != 0) {
    Fail("ValueError", op, "q", "expected strides of a multiple of 4 elements and an address of a ",
         "multiple of ", piece, " bytes on a GPU, got strides ", p->q_token_stride, " and ",
         p->q_head_stride);
  }
  const int64_t out_piece = 4 * SizeOf(p->out_dtype);
  if (reinterpret_cast<uintptr_t>(p->out) % out_piece != 0) {
    Fail("ValueError", op, "out", "expected an address of a multiple of ", out_piece,
         " bytes on a GPU");
  }
  if (p->paged) RequireAlignedCache(op, p->cache);
  AttentionSizes sizes;
  sizes.num_tokens = p->seqs.num_tokens;
  sizes.batch = p->seqs.batch;
  sizes.num_heads = p->num_heads;
  sizes.num_kv_heads = p->num_kv_heads;
  sizes.head_dim = p->head_dim;
  sizes.element_bytes = SizeOf(keys);
  sizes.max_seqlen_q = p->max_seqlen_q;
  sizes.max_seqlen_k = p->max_seqlen_k;
  if (p->out == nullptr) return;
  const DeviceGuard guard(op, place.GetDeviceId());
  cuda::DeviceFacts facts;
  CheckCuda(op, cuda::GetDeviceFacts(place.GetDeviceId(), &facts));
  sizes.num_sms = facts.processors;
  sizes.max_cluster = cuda::MaxAttentionCluster(facts);
  cuda::PrefillKernel prefill = cuda::ChoosePrefill(*p, facts);
  sizes.long_seq = cuda::LongSeqTokens(*p, prefill);
  const AttentionPlan plan = PlanAttention(sizes);
  if (plan.Whole() == nullptr) prefill = cuda::PrefillKernel::kNone;
  const int64_t floats = plan.workspace + cuda::PrefillWorkspace(*p, prefill);
  Tensor workspace;
  if (floats > 0) {
    workspace = paddle::empty({floats}, phi::DataType::FLOAT32, place);
    p->workspace = MutableData<float>(workspace);
  }
  Guarded(op, [&] {
    const cudaStream_t stream = out.stream();
    CheckCuda(op, cuda::LaunchQuantizeQuery(query, stream));
    CheckCuda(op, cuda::LaunchAttention(*p, plan, prefill, stream));
  });
}

#endif

// Allocates what was not given and runs. Tokens of no row become 0 in a new output and keep what
// is there in a given one; their LSE is -inf.
std::vector<Tensor> Run(const char* op, const CommonArgs& args, const phi::Place& place,
                        AttentionParams* p) {
  Tensor out = args.out ? *args.out : paddle::empty(args.q.shape(), ToPhi(p->out_dtype), place);
  Tensor lse;  // undefined unless asked for
  if (args.return_softmax_lse) {
    lse = paddle::empty({p->num_heads, p->seqs.num_tokens}, phi::DataType::FLOAT32, place);
    p->lse = MutableData<float>(lse);
  }
  p->out = MutableData(out);
  p->clear_padding = args.out == nullptr;
  QuantizeQueryParams query;  // without tokens where the queries are taken as they are
  Tensor query_codes;
  if (args.quantize_q) query_codes = TakeQueryCodes(place, p, &query);
#if defined(FASTATTN_WITH_CUDA)
  if (place.GetType() == phi::AllocationType::GPU) {
    RunOnGpu(op, place, out, query, p);
    return {out, lse};
  }
#endif
  RequireCpu(op, place);
  if (p->clear_padding && p->out != nullptr) {
    std::memset(p->out, 0, static_cast<size_t>(out.numel()) * SizeOf(p->out_dtype));
  }
  if (p->lse != nullptr) {
    std::fill(p->lse, p->lse + lse.numel(), -std::numeric_limits<float>::infinity());
  }
  Guarded(op, [&] {
    if (args.quantize_q) cpu::QuantizeQuery(query);
    cpu::Attention(*p);
  });
  return {out, lse};
}

// Element type of flash_attention's K and V. A uint8 tensor's codes are what kv_dtype says.
DType ParseKvDtype(const std::string& name, const Tensor& key, DType q_dtype) {
  if (name != "auto" && name != "e4m3" && name != "e5m2" && name != "int8") {
    Fail("ValueError", kFlash, "kv_dtype", "expected auto, e4m3, e5m2 or int8, got '", name, "'");
  }
  const DType named = name == "int8" ? DType::kInt8 : name == "e5m2" ? DType::kE5M2 : DType::kE4M3;
  const DType given = ToDType(kFlash, "k", key.dtype());
  if (given == DType::kUInt8) return named;
  if (SizeOf(given) == 1) {
    if (name != "auto" && named != given) {
      Fail("TypeError", kFlash, "k", "expected codes of kv_dtype ", name, ", got ", key.dtype());
    }
    return given;
  }
  if (name != "auto") {
    Fail("TypeError", kFlash, "k", "expected codes of kv_dtype ", name, ", got ", key.dtype());
  }
  if (given != q_dtype) {
    Fail("TypeError", kFlash, "k", "expected 8-bit codes or dtype ",
         q_dtype == DType::kE4M3 ? "float8_e4m3fn" : NameOf(q_dtype), " as q has, got ",
         key.dtype());
  }
  return given;
}

void ParsePackedKv(const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                   const Tensor& cu_seqlens_k, const Tensor* k_descale, const Tensor* v_descale,
                   const std::string& kv_dtype, const phi::Place& place, AttentionParams* p) {
  const Arg key(kFlash, "k", k), value(kFlash, "v", v);
  key.On(place).Rank(3).LastDimContiguous();
  value.On(place).Dtype({k.dtype()}).Dims(k.shape()).LastDimContiguous();
  const Sizes shape = SizesOf(k);
  CheckHeads(kFlash, "k", shape[1], shape[2], p);
  RaggedKv& kv = p->ragged;
  kv.dtype = ParseKvDtype(kv_dtype, k, p->q_dtype);
  kv.key = Data(k);
  kv.value = Data(v);
  kv.num_tokens = shape[0];
  const Sizes key_strides = StridesOf(k), value_strides = StridesOf(v);
  kv.key_token_stride = key_strides[0];
  kv.key_head_stride = key_strides[1];
  kv.value_token_stride = value_strides[0];
  kv.value_head_stride = value_strides[1];

  for (const auto& [name, lengths] :
       {std::pair<const char*, const Tensor*>{"cu_seqlens_q", &cu_seqlens_q},
        std::pair<const char*, const Tensor*>{"cu_seqlens_k", &cu_seqlens_k}}) {
    Arg(kFlash, name, *lengths).On(place).Dtype({phi::DataType::INT32}).Rank(1).Contiguous();
    if (lengths->numel() < 1 || lengths->numel() != cu_seqlens_q.numel()) {
      Fail("ValueError", kFlash, name, "expected shape [rows + 1], the same for cu_seqlens_q and ",
           "cu_seqlens_k, got ", ShapeText(lengths->shape()));
    }
  }
  RequireFits(kFlash, "cu_seqlens_q", cu_seqlens_q.numel());
  p->seqs.batch = static_cast<int>(cu_seqlens_q.numel() - 1);
  p->seqs.cu_seqlens_q = Data<int>(cu_seqlens_q);
  kv.cu_seqlens_k = Data<int>(cu_seqlens_k);
  for (const auto& [name, scale, target] :
       {std::tuple<const char*, const Tensor*, Descale*>{"k_descale", k_descale, &kv.k_descale},
        std::tuple<const char*, const Tensor*, Descale*>{"v_descale", v_descale, &kv.v_descale}}) {
    if (scale == nullptr) continue;
    if (SizeOf(kv.dtype) != 1) {
      Fail("ValueError", kFlash, name, "expected None for ", NameOf(kv.dtype),
           " keys and values; it belongs to 8-bit codes");
    }
    *target = ParseDescale(kFlash, name, *scale, place, p->seqs.batch, p->num_kv_heads);
  }
}

}  // namespace

// Optional tensors come as non-const references, and optional shapes and dtypes as plain ones where
// their absence does not matter: for each further optional argument Paddle 2.6 would instantiate
// these calls twice as often, and eight of them take minutes to compile.
std::vector<Tensor> FlashAttention(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                   OptionalTensor& q_descale, OptionalTensor& k_descale,
                                   OptionalTensor& v_descale, OptionalTensor& sinks,
                                   OptionalTensor& mask_offsets, OptionalTensor& out_scale,
                                   OptionalTensor& out, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                   float softmax_scale, bool causal, int64_t window_left,
                                   int64_t window_right, float softcap, bool return_softmax_lse,
                                   const std::string& out_dtype, const std::string& kv_dtype,
                                   bool quantize_q) {
  AttentionParams p;
  ParseQuery(kFlash, q, &p);
  const auto place = q.numel() > 0 ? q.place() : cu_seqlens_q.place();
  p.seqs.num_tokens = static_cast<int>(q.shape()[0]);
  ParsePackedKv(k, v, cu_seqlens_q, cu_seqlens_k, Get(k_descale), Get(v_descale), kv_dtype, place,
                &p);
  const CommonArgs args{
      q,           Get(q_descale), Get(sinks),    Get(mask_offsets), Get(out_scale),
      Get(out),    out_dtype,      softmax_scale, softcap,           causal,
      window_left, window_right,   max_seqlen_q,  max_seqlen_k,      return_softmax_lse,
      quantize_q};
  ParseCommon(kFlash, args, place, &p);
  if (args.out != nullptr) {
    RequireApart(kFlash, "out", *args.out,
                 {{"k", &k},
                  {"v", &v},
                  {"k_descale", Get(k_descale)},
                  {"v_descale", Get(v_descale)},
                  {"cu_seqlens_q", &cu_seqlens_q},
                  {"cu_seqlens_k", &cu_seqlens_k}});
  }
  return Run(kFlash, args, place, &p);
}

std::vector<Tensor> PagedAttention(
    const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
    const Tensor& cu_seqlens_q, const Tensor& seq_lens_decoder, const Tensor& seq_lens_this_time,
    OptionalTensor& cache_k_scales, OptionalTensor& cache_v_scales, OptionalTensor& q_descale,
    OptionalTensor& sinks, OptionalTensor& mask_offsets, OptionalTensor& out_scale,
    OptionalTensor& out, int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& cache_quant_type,
    const std::string& fp8_format, bool quantize_q) {
  AttentionParams p;
  ParseQuery(kPaged, q, &p);
  const auto place = q.numel() > 0 ? q.place() : block_tables.place();
  p.paged = true;
  p.cache = ParsePagedCache(kPaged,
                            {key_cache, value_cache, Get(cache_k_scales), Get(cache_v_scales),
                             cache_quant_type, fp8_format},
                            place);
  CheckHeads(kPaged, "key_cache", p.cache.num_kv_heads, p.cache.head_dim, &p);
  if (p.cache.type == CacheType::kNone && p.q_dtype != p.cache.dtype) {
    Fail("TypeError", kPaged, "q", "expected dtype ", NameOf(p.cache.dtype),
         " as the cache has, got ", q.dtype());
  }
  p.seqs = ParseRows(kPaged, block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time,
                     nullptr, q.shape()[0], place);
  const CommonArgs args{
      q,           Get(q_descale), Get(sinks),    Get(mask_offsets), Get(out_scale),
      Get(out),    out_dtype,      softmax_scale, softcap,           causal,
      window_left, window_right,   max_seqlen_q,  max_seqlen_k,      return_softmax_lse,
      quantize_q};
  ParseCommon(kPaged, args, place, &p);
  if (args.out != nullptr) {
    RequireApart(kPaged, "out", *args.out,
                 {{"key_cache", &key_cache},
                  {"value_cache", &value_cache},
                  {"cache_k_scales", Get(cache_k_scales)},
                  {"cache_v_scales", Get(cache_v_scales)},
                  {"block_tables", &block_tables},
                  {"cu_seqlens_q", &cu_seqlens_q},
                  {"seq_lens_decoder", &seq_lens_decoder},
                  {"seq_lens_this_time", &seq_lens_this_time}});
  }
  return Run(kPaged, args, place, &p);
}

namespace {

using OptionalDtype = paddle::optional<phi::DataType>;

std::vector<Shape> ResultShapes(const Shape& q, bool return_softmax_lse) {
  return {q, return_softmax_lse && q.size() == 3 ? Shape{q[1], q[0]} : Shape{1}};
}

std::vector<phi::DataType> ResultDtypes(const phi::DataType& q, bool has_out_scale,
                                        const OptionalDtype& out, const std::string& out_dtype) {
  phi::DataType dtype = q;
  if (out) {
    dtype = *out;
  } else if (has_out_scale) {
    dtype = phi::DataType::UINT8;
  } else if (out_dtype == "float32") {
    dtype = phi::DataType::FLOAT32;
  } else if (q != phi::DataType::FLOAT32 && q != phi::DataType::FLOAT16) {
    dtype = out_dtype == "float16" ? phi::DataType::FLOAT16 : phi::DataType::BFLOAT16;
  }
  return {dtype, phi::DataType::FLOAT32};
}

}  // namespace

std::vector<Shape> FlashInferShape(
    const Shape& q, const Shape& k, const Shape& v, const Shape& cu_seqlens_q,
    const Shape& cu_seqlens_k, const Shape& q_descale, const Shape& k_descale,
    const Shape& v_descale, const Shape& sinks, const Shape& mask_offsets, const Shape& out_scale,
    const Shape& out, int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& kv_dtype, bool quantize_q) {
  return ResultShapes(q, return_softmax_lse);
}

std::vector<phi::DataType> FlashInferDtype(
    const phi::DataType& q, const phi::DataType& k, const phi::DataType& v,
    const phi::DataType& cu_seqlens_q, const phi::DataType& cu_seqlens_k,
    const phi::DataType& q_descale, const phi::DataType& k_descale, const phi::DataType& v_descale,
    const phi::DataType& sinks, const phi::DataType& mask_offsets, const OptionalDtype& out_scale,
    const OptionalDtype& out, int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale,
    bool causal, int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& kv_dtype, bool quantize_q) {
  return ResultDtypes(q, static_cast<bool>(out_scale), out, out_dtype);
}

std::vector<Shape> PagedInferShape(
    const Shape& q, const Shape& key_cache, const Shape& value_cache, const Shape& block_tables,
    const Shape& cu_seqlens_q, const Shape& seq_lens_decoder, const Shape& seq_lens_this_time,
    const Shape& cache_k_scales, const Shape& cache_v_scales, const Shape& q_descale,
    const Shape& sinks, const Shape& mask_offsets, const Shape& out_scale, const Shape& out,
    int64_t max_seqlen_q, int64_t max_seqlen_k, float softmax_scale, bool causal,
    int64_t window_left, int64_t window_right, float softcap, bool return_softmax_lse,
    const std::string& out_dtype, const std::string& cache_quant_type,
    const std::string& fp8_format, bool quantize_q) {
  return ResultShapes(q, return_softmax_lse);
}

std::vector<phi::DataType> PagedInferDtype(
    const phi::DataType& q, const phi::DataType& key_cache, const phi::DataType& value_cache,
    const phi::DataType& block_tables, const phi::DataType& cu_seqlens_q,
    const phi::DataType& seq_lens_decoder, const phi::DataType& seq_lens_this_time,
    const phi::DataType& cache_k_scales, const phi::DataType& cache_v_scales,
    const phi::DataType& q_descale, const phi::DataType& sinks, const phi::DataType& mask_offsets,
    const OptionalDtype& out_scale, const OptionalDtype& out, int64_t max_seqlen_q,
    int64_t max_seqlen_k, float softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, float softcap, bool return_softmax_lse, const std::string& out_dtype,
    const std::string& cache_quant_type, const std::string& fp8_format, bool quantize_q) {
  return ResultDtypes(q, static_cast<bool>(out_scale), out, out_dtype);
}

}  // namespace fastattn::api

PD_BUILD_OP(fastattn_flash_attention)
    .Inputs({"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", paddle::Optional("q_descale"),
             paddle::Optional("k_descale"), paddle::Optional("v_descale"),
             paddle::Optional("sinks"), paddle::Optional("mask_offsets"),
             paddle::Optional("out_scale"), paddle::Optional("out")})
    .Outputs({"result", "softmax_lse", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_seqlen_q: int64_t", "max_seqlen_k: int64_t", "softmax_scale: float",
            "causal: bool", "window_left: int64_t", "window_right: int64_t", "softcap: float",
            "return_softmax_lse: bool", "out_dtype: std::string", "kv_dtype: std::string",
            "quantize_q: bool"})
    .SetKernelFn(PD_KERNEL(fastattn::api::Registered<&fastattn::api::FlashAttention>::Run))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::FlashInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::FlashInferDtype));

PD_BUILD_OP(fastattn_paged_attention)
    .Inputs({"q", "key_cache", "value_cache", "block_tables", "cu_seqlens_q", "seq_lens_decoder",
             "seq_lens_this_time", paddle::Optional("cache_k_scales"),
             paddle::Optional("cache_v_scales"), paddle::Optional("q_descale"),
             paddle::Optional("sinks"), paddle::Optional("mask_offsets"),
             paddle::Optional("out_scale"), paddle::Optional("out")})
    .Outputs({"result", "softmax_lse", paddle::Optional("out_out")})
    .SetInplaceMap({{paddle::Optional("out"), paddle::Optional("out_out")}})
    .Attrs({"max_seqlen_q: int64_t", "max_seqlen_k: int64_t", "softmax_scale: float",
            "causal: bool", "window_left: int64_t", "window_right: int64_t", "softcap: float",
            "return_softmax_lse: bool", "out_dtype: std::string", "cache_quant_type: std::string",
            "fp8_format: std::string", "quantize_q: bool"})
    .SetKernelFn(PD_KERNEL(fastattn::api::Registered<&fastattn::api::PagedAttention>::Run))
    .SetInferShapeFn(PD_INFER_SHAPE(fastattn::api::PagedInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(fastattn::api::PagedInferDtype));

namespace fastattn::api {

namespace {

const bool kDirectFlashAttention = AddDirect<&FlashAttention>(
    "fastattn_flash_attention", {"q", "k", "v", "q_descale", "k_descale", "v_descale"});
const bool kDirectPagedAttention = AddDirect<&PagedAttention>(
    "fastattn_paged_attention",
    {"q", "q_descale", "key_cache", "value_cache", "cache_k_scales", "cache_v_scales"});

}  // namespace

}  // namespace fastattn::api
