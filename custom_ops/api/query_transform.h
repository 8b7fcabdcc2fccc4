// Attention over transformed keys (k_rotation, k_center): buffers of what is done to the queries
// ahead of it, and to LSE and output behind it.
#pragma once

#include "api/check.h"
#include "params/attention.h"
#include "params/key_transform.h"
#include "params/query_transform.h"

namespace fastattn::api {

inline void CheckQueryTransform(const char* op, const KeyTransform& transform, const Tensor* out,
                                bool return_softmax_lse, const AttentionParams& p) {
  if (!transform.Any()) return;
  const bool rotates = transform.rotation != KeyRotation::kNone;
  const bool shifts = transform.center != nullptr && p.softcap > 0;
  if (shifts) {
    Fail("NotImplementedError", op, "k_center", "softcap is not supported with it: a score that ",
         "lacks a constant has another tanh");
  }
  if (p.q_dtype == DType::kE4M3 && rotates) {
    Fail("NotImplementedError", op, "k_rotation", "e4m3 queries are not supported: quantise ",
         "queries that are rotated (q_rotation of rope_write_cache_kv), and leave it out here");
  }
  if (p.q_dtype == DType::kE4M3 && (return_softmax_lse || p.sinks != nullptr)) {
    Fail("NotImplementedError", op, "k_center", "e4m3 queries are not supported with it where an ",
         "LSE is returned or a sink counts");
  }
  if (transform.center != nullptr && p.sinks != nullptr && out != nullptr) {
    Fail("NotImplementedError", op, "out", "a given output is not supported with k_center and ",
         "sinks");
  }
}

class QueryTransform {
 public:
  QueryTransformParams before;  // the attention
  ScoreShiftParams after;

  // Makes p's queries those that `before` writes and, if need be, p's output and LSE those that
  // `after` reads. p has its output and LSE already.
  void Take(const phi::Place& place, const KeyTransform& transform, AttentionParams* p) {
    if (!transform.Any()) return;
    const int64_t tokens = p->seqs.num_tokens, heads = p->num_heads, dim = p->head_dim;
    const auto floats = [&place](std::vector<int64_t> shape, Tensor* tensor) {
      *tensor = paddle::empty(shape, phi::DataType::FLOAT32, place);
      return MutableData<float>(*tensor);
    };
    before.q = p->q;
    before.q_dtype = p->q_dtype;
    before.num_tokens = p->seqs.num_tokens;
    before.num_heads = p->num_heads;
    before.num_kv_heads = p->num_kv_heads;
    before.head_dim = p->head_dim;
    before.q_token_stride = p->q_token_stride;
    before.q_head_stride = p->q_head_stride;
    before.softmax_scale = p->softmax_scale;
    if (transform.rotation != KeyRotation::kNone) {
      rotated_ = paddle::empty({tokens, heads, dim}, ToPhi(p->q_dtype), place);
      before.rotated = MutableData(rotated_);
      p->q = before.rotated;
      p->q_token_stride = heads * dim;
      p->q_head_stride = dim;
    }
    // A constant that all scores of a query lack changes nothing else.
    if (transform.center == nullptr || (p->lse == nullptr && p->sinks == nullptr)) return;
    before.center = transform.center;
    before.shifts = floats({tokens, heads}, &shifts_);
    after.shifts = before.shifts;
    after.num_tokens = p->seqs.num_tokens;
    after.num_heads = p->num_heads;
    after.value_dim = ValueDim(p->head_dim);
    after.lse = p->lse;
    after.lse_in = p->lse;
    if (p->sinks == nullptr) return;
    after.sinks = p->sinks;
    after.sinks_dtype = p->sinks_dtype;
    after.out = p->out;
    after.out_dtype = p->out_dtype;
    after.out_scale = p->out_scale;
    p->lse = floats({heads, tokens}, &lse_);
    p->out = floats({tokens, heads, ValueDim(p->head_dim)}, &partial_);
    p->out_dtype = DType::kFloat32;
    p->out_scale = nullptr;
    p->sinks = nullptr;
    after.lse_in = p->lse;
    after.partial = static_cast<const float*>(p->out);
  }

  bool Prepares() const { return before.rotated != nullptr || before.shifts != nullptr; }
  bool Finishes() const { return after.shifts != nullptr; }

 private:
  Tensor rotated_, shifts_, lse_, partial_;
};

}  // namespace fastattn::api
