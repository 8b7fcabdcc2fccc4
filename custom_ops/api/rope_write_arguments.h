// Arguments of the operators that write a step's keys and values from a fused projection.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "api/check.h"
#include "api/paged_cache.h"
#include "params/key_transform.h"
#include "params/rope.h"

namespace fastattn::api {

// With the names and shapes of rope_write_cache_kv. A null tensor was not given.
struct RopeWriteArgs {
  CacheArgs cache;
  const Tensor* qkv = nullptr;
  const Tensor* rotary_embs = nullptr;
  const Tensor* block_tables = nullptr;
  const Tensor* cu_seqlens_q = nullptr;
  const Tensor* seq_lens_decoder = nullptr;
  const Tensor* seq_lens_this_time = nullptr;
  const Tensor* q_norm_weight = nullptr;
  const Tensor* k_norm_weight = nullptr;
  const Tensor* qkv_bias = nullptr;
  const Tensor* q_scale = nullptr;
  const Tensor* k_center = nullptr;
  const Tensor* k_feedback = nullptr;
  const Tensor* batch_id_per_token = nullptr;
  int num_heads = 0;
  int num_kv_heads = 0;
  float rms_norm_eps = 0;
  bool use_neox_rotary_style = false;
  int rotary_dim = -1;
  bool qk_norm_before_rope = false;
  std::string q_quant;
  std::string k_rotation;

  // What is read and never written: the writer's tensors, then `more`.
  std::vector<NamedTensor> Read(std::initializer_list<NamedTensor> more = {}) const;
};

QQuant ParseQQuant(const char* op, const std::string& name);

// Place of a step: where its cache is, if it has one.
phi::Place PlaceOfStep(const char* op, const Tensor& qkv, const Tensor& key_cache);

// Checks all arguments apart from shared memory, and fills `p`. Returns the transform of K, by
// which Q is not rotated yet. The memory of Q is missing still: see AllocateQueries.
KeyTransform ParseRopeWrite(const char* op, const RopeWriteArgs& args, const phi::Place& place,
                            RopeWriteCacheParams* p);

// Shape of the scales that are measured for Q; [1] where none are.
Shape QDescaleShape(QQuant quant, int64_t num_tokens, int64_t num_heads);

// Q, and its scales where they are measured.
struct Queries {
  Tensor q;          // [T, H, D]
  Tensor q_descale;  // [T, H] or undefined
};

// Memory of what a writer returns. `p` then points to it.
Queries AllocateQueries(const phi::Place& place, RopeWriteCacheParams* p);

}  // namespace fastattn::api
