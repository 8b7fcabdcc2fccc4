#include "api/rope_write_arguments.h"

#include <algorithm>
#include <iterator>

#include "api/key_transform.h"
#include "api/rope_args.h"

namespace fastattn::api {

namespace {

void ParseQScale(const char* op, const Tensor* q_scale, const phi::Place& place,
                 RopeWriteCacheParams* p) {
  if (p->q_quant == QQuant::kPerTensor) {
    if (q_scale == nullptr) {
      Fail("ValueError", op, "q_scale", "q_quant 'per_tensor' needs a scale, got None");
    }
    Arg(op, "q_scale", *q_scale).On(place).Dtype({phi::DataType::FLOAT32}).Dims({1});
    p->q_scale = Data<float>(*q_scale);
  } else if (q_scale != nullptr) {
    Fail("ValueError", op, "q_scale", "q_quant '", NameOf(p->q_quant), "' takes no scale");
  }
}

}  // namespace

std::vector<NamedTensor> RopeWriteArgs::Read(std::initializer_list<NamedTensor> more) const {
  const NamedTensor own[] = {{"qkv", qkv},
                             {"rotary_embs", rotary_embs},
                             {"block_tables", block_tables},
                             {"cu_seqlens_q", cu_seqlens_q},
                             {"seq_lens_decoder", seq_lens_decoder},
                             {"seq_lens_this_time", seq_lens_this_time},
                             {"q_norm_weight", q_norm_weight},
                             {"k_norm_weight", k_norm_weight},
                             {"qkv_bias", qkv_bias},
                             {"q_scale", q_scale},
                             {"k_center", k_center},
                             {"k_feedback", k_feedback},
                             {"batch_id_per_token", batch_id_per_token}};
  std::vector<NamedTensor> given;
  given.reserve(std::size(own) + more.size());
  const auto add = [&given](const NamedTensor& read) {
    if (read.tensor != nullptr) given.push_back(read);
  };
  std::for_each(std::begin(own), std::end(own), add);
  std::for_each(more.begin(), more.end(), add);
  return given;
}

QQuant ParseQQuant(const char* op, const std::string& name) {
  for (QQuant quant : {QQuant::kNone, QQuant::kPerTensor, QQuant::kPerTokenHead}) {
    if (name == NameOf(quant)) return quant;
  }
  Fail("ValueError", op, "q_quant", "expected none, per_tensor or per_token_head, got '", name,
       "'");
}

phi::Place PlaceOfStep(const char* op, const Tensor& qkv, const Tensor& key_cache) {
  Arg(op, "qkv", qkv);
  return key_cache.defined() && key_cache.initialized() ? key_cache.place() : qkv.place();
}

KeyTransform ParseRopeWrite(const char* op, const RopeWriteArgs& args, const phi::Place& place,
                            RopeWriteCacheParams* p) {
  const Tensor& qkv = *args.qkv;
  p->cache = ParsePagedCache(op, args.cache, place);
  RequireEqualDims(op, p->cache);
  RequireAligned(op, "key_cache", args.cache.key_cache, kVectorBytes);
  RequireAligned(op, "value_cache", args.cache.value_cache, kVectorBytes);
  ParseQkv(op, qkv, args.num_heads, args.num_kv_heads, *p);
  RequireAligned(op, "qkv", qkv, kVectorBytes);
  Arg(op, "qkv", qkv).On(place);
  p->seqs = ParseSeqs(op, *args.block_tables, *args.cu_seqlens_q, *args.seq_lens_decoder,
                      *args.seq_lens_this_time, args.batch_id_per_token, qkv.shape()[0], place,
                      p->cache.num_kv_heads);
  ParseRotary(op, args.rotary_embs, args.use_neox_rotary_style, args.rotary_dim, place, *p);
  const int head_dim = p->cache.head_dim;
  p->bias = ParseVector(op, "qkv_bias", args.qkv_bias, qkv.shape()[1], place, p->bias_dtype);
  p->q_norm_weight =
      ParseVector(op, "q_norm_weight", args.q_norm_weight, head_dim, place, p->q_norm_dtype);
  p->k_norm_weight =
      ParseVector(op, "k_norm_weight", args.k_norm_weight, head_dim, place, p->k_norm_dtype);
  p->norm_before_rope = args.qk_norm_before_rope;
  p->rms_norm_eps = ParseEps(op, args.rms_norm_eps);
  p->q_quant = ParseQQuant(op, args.q_quant);
  ParseQScale(op, args.q_scale, place, p);
  return ParseKeyTransform(op, args.k_center, args.k_rotation, p->cache, place, args.k_feedback);
}

Shape QDescaleShape(QQuant quant, int64_t num_tokens, int64_t num_heads) {
  return quant == QQuant::kPerTokenHead ? Shape{num_tokens, num_heads} : Shape{1};
}

Queries AllocateQueries(const phi::Place& place, RopeWriteCacheParams* p) {
  const int64_t tokens = p->seqs.num_tokens, heads = p->num_heads;
  const bool keeps = p->q_quant == QQuant::kNone;
  Queries made;
  made.q = paddle::empty({tokens, heads, p->cache.head_dim},
                         keeps ? ToPhi(p->dtype) : phi::DataType::UINT8, place);
  p->q = MutableData(made.q);
  if (p->q_quant == QQuant::kPerTokenHead) {
    made.q_descale = paddle::empty({tokens, heads}, phi::DataType::FLOAT32, place);
    p->q_descale = MutableData<float>(made.q_descale);
  }
  return made;
}

}  // namespace fastattn::api
