#include "api/attention_arguments.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "api/paged_cache.h"
#include "api/quantize_query.h"
#include "api/query_transform.h"
#include "api/ranges.h"
#include "api/softmax_scale.h"
#include "common/bounds.h"
#include "common/head_dims.h"

namespace fastattn::api {

namespace {

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
         ", ", kv_heads, "] (sequences, KV heads), got ", ShapeText(shape));
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
         p->num_kv_heads, "] (sequences, KV heads) or [", tokens, ", ", heads,
         "] (tokens, query heads), got ", ShapeText(shape));
  }
  p->q_descale = ParseDescale(op, "q_descale", *scale, place, p->seqs.batch, p->num_kv_heads);
}

DType OutputType(const char* op, const AttentionArgs& args, const AttentionParams& p) {
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

}  // namespace

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

Shape OutputShape(const AttentionArgs& args, const AttentionParams& p) {
  const int64_t tokens = p.seqs.num_tokens, heads = p.num_heads, dim = ValueDim(p.head_dim);
  return args.flat ? Shape{tokens, heads * dim} : Shape{tokens, heads, dim};
}

void RequireApartFromQueries(const char* op, const Tensor& out, const Tensor& q,
                             const AttentionParams& p) {
  if (ValueDim(p.head_dim) == p.head_dim) {
    RequireSameOrApart(op, "out", out, "q", q);  // kernels read before they write
  } else {
    RequireApart(op, "out", out, {{"q", &q}});
  }
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
  if (!AttentionHeadDims::Has(head_dim)) {
    Fail("NotImplementedError", op, "q", "head_dim ", head_dim,
         " is not supported; supported: ", AttentionHeadDims::Text());
  }
  p->num_kv_heads = static_cast<int>(kv_heads);
}

void ParseRaggedKv(const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                   const Tensor& cu_seqlens_k, const Tensor* k_descale, const Tensor* v_descale,
                   const std::string& kv_dtype, const phi::Place& place, AttentionParams* p) {
  const Arg key(kFlash, "k", k), value(kFlash, "v", v);
  key.On(place).Rank(3).LastDimContiguous();
  const Sizes shape = SizesOf(k);
  auto value_shape = k.shape();
  value_shape[2] =
      AttentionHeadDims::Has(shape[2]) ? ValueDim(static_cast<int>(shape[2])) : shape[2];
  value.On(place).Dtype({k.dtype()}).Dims(value_shape).LastDimContiguous();
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
      Fail("ValueError", kFlash, name,
           "expected shape [sequences + 1], the same for cu_seqlens_q and ", "cu_seqlens_k, got ",
           ShapeText(lengths->shape()));
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

void ParseHoles(const Tensor* tree_mask, const Tensor* head_windows, const phi::Place& place,
                AttentionParams* p) {
  if (tree_mask != nullptr) {
    Arg(kPaged, "tree_mask", *tree_mask)
        .On(place)
        .Dtype({phi::DataType::BOOL, phi::DataType::UINT8, phi::DataType::INT8})
        .Rank(3)
        .Contiguous();
    const Sizes shape = SizesOf(*tree_mask);
    if (shape[0] < p->seqs.batch || shape[1] != shape[2]) {
      Fail("ValueError", kPaged, "tree_mask", "expected shape [", p->seqs.batch,
           ", N, N] (sequences or more, new tokens of each, twice), got ", ShapeText(shape));
    }
    for (int64_t size : shape) RequireFits(kPaged, "tree_mask", size);
    p->tree.data = Data<uint8_t>(*tree_mask);
    p->tree.size = static_cast<int>(shape[1]);
  }
  if (head_windows != nullptr) {
    Arg(kPaged, "head_windows", *head_windows)
        .On(place)
        .Dtype({phi::DataType::INT32})
        .Dims({p->num_kv_heads, 2})
        .Contiguous();
    p->head_windows = Data<int>(*head_windows);
  }
  if (p->batch_invariant && p->IsGeneral()) {
    const char* given = tree_mask != nullptr      ? "tree_mask"
                        : head_windows != nullptr ? "head_windows"
                                                  : "a block table for each KV head";
    Fail("NotImplementedError", kPaged, "batch_invariant", "not supported with ", given);
  }
}

int WindowSide(const char* op, int64_t side) {
  if (side < -1) {
    Fail("ValueError", op, "window_size", "expected -1 (unlimited) or at least 0, got ", side);
  }
  return side < kMaxWindow ? static_cast<int>(side) : -1;
}

void ParseCommon(const char* op, const AttentionArgs& args, const phi::Place& place,
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
  if (!std::isfinite(args.softcap) || args.softcap < 0) {
    Fail("ValueError", op, "softcap", "expected a finite number of at least 0, got ", args.softcap);
  }
  p->softmax_scale = ParseSoftmaxScale(op, args.softmax_scale, p->head_dim);
  p->softcap = static_cast<float>(args.softcap);
  CheckQueryTransform(op, args.transform, args.out, args.return_softmax_lse, *p);
  p->causal = args.causal;
  p->window_left = WindowSide(op, args.window_left);
  p->window_right = WindowSide(op, args.window_right);
  // A program that does not know its number of tokens gives a bound beyond any.
  p->max_seqlen_q =
      std::min(LengthBound(op, "max_seqlen_q", args.max_seqlen_q), std::max(p->seqs.num_tokens, 0));
  p->max_seqlen_k = LengthBound(op, "max_seqlen_k", args.max_seqlen_k);
  p->out_dtype = OutputType(op, args, *p);
  if (args.out != nullptr) {
    const Arg arg(op, "out", *args.out);
    arg.On(place).Dims(OutputShape(args, *p)).Contiguous();
    if (p->out_dtype == DType::kE4M3) {
      const DType given = ToDType(op, "out", args.out->dtype());
      if (given != DType::kUInt8 && given != DType::kE4M3) {
        Fail("TypeError", op, "out", "expected dtype uint8 or float8_e4m3fn with out_scale, got ",
             args.out->dtype());
      }
    } else {
      arg.Dtype({ToPhi(p->out_dtype)});
    }
    RequireApart(op, "out", *args.out,
                 {{"q_descale", args.q_descale},
                  {"sinks", args.sinks},
                  {"mask_offsets", args.mask_offsets},
                  {"out_scale", args.out_scale}});
  }
}

}  // namespace fastattn::api
