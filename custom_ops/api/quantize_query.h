// The option quantize_q of the attention operators: 16-bit queries become e4m3 codes with a scale
// for each token and head, and the attention is then that of e4m3 queries.
#pragma once

#include "api/check.h"
#include "params/attention.h"
#include "params/quantize_query.h"

namespace fastattn::api {

// p holds queries and keys already.
inline void CheckQuantizeQuery(const char* op, const Tensor* q_descale, const AttentionParams& p) {
  if (p.q_dtype != DType::kBFloat16 && p.q_dtype != DType::kFloat16) {
    Fail("ValueError", op, "quantize_q", "expected bfloat16 or float16 queries, got ",
         NameOf(p.q_dtype));
  }
  if (q_descale != nullptr) {
    Fail("ValueError", op, "quantize_q", "expected no q_descale, which belongs to e4m3 queries: ",
         "16-bit ones get their scales here");
  }
  const DType keys = p.paged ? p.cache.dtype : p.ragged.dtype;
  if (keys != DType::kE4M3) {
    Fail("ValueError", op, "quantize_q", "expected e4m3 keys and values, got ", NameOf(keys));
  }
}

// Makes p's queries the codes that `query` says to write. They lie in the returned tensor, their
// scales behind them.
inline Tensor TakeQueryCodes(const phi::Place& place, AttentionParams* p,
                             QuantizeQueryParams* query) {
  query->q = p->q;
  query->q_dtype = p->q_dtype;
  query->num_tokens = p->seqs.num_tokens;
  query->num_heads = p->num_heads;
  query->head_dim = p->head_dim;
  query->q_token_stride = p->q_token_stride;
  query->q_head_stride = p->q_head_stride;
  const int64_t pairs = static_cast<int64_t>(query->num_tokens) * query->num_heads;
  const int64_t code_floats = pairs * query->head_dim / 4;
  Tensor buffer = paddle::empty({code_floats + pairs}, phi::DataType::FLOAT32, place);
  float* floats = MutableData<float>(buffer);
  query->codes = reinterpret_cast<uint8_t*>(floats);
  query->descale = floats == nullptr ? nullptr : floats + code_floats;

  p->q = query->codes;
  p->q_dtype = DType::kE4M3;
  p->q_token_stride = static_cast<int64_t>(p->num_heads) * p->head_dim;
  p->q_head_stride = p->head_dim;
  p->q_descale = Descale{};
  p->q_descale.data = query->descale;
  p->q_descale.token_stride = p->num_heads;
  p->q_descale.head_stride = 1;
  p->q_descale.per_query_head = true;
  return buffer;
}

}  // namespace fastattn::api
