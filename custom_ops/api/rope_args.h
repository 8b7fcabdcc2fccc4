// Parsing and checking of what operators on a fused projection take besides the cache.
#pragma once

#include "api/check.h"
#include "params/rope.h"

namespace fastattn::api {

// Refuses a cache of which V has fewer channels than K: a fused projection has heads of one size.
void RequireEqualDims(const char* op, const PagedCache& cache);

// Head dimension of a projection [tokens, (H + 2 KV) * D] that has not been checked yet; 0 if it
// has no such shape.
int64_t FusedHeadDim(const Tensor& qkv, int num_heads, int num_kv_heads);

// Fills qkv, its type and strides and num_heads; p.cache is parsed already.
void ParseQkv(const char* op, const Tensor& qkv, int num_heads, int num_kv_heads,
              RopeWriteCacheParams& p);

// A per-channel parameter of any floating point type, or null.
const void* ParseVector(const char* op, const char* name, const Tensor* tensor, int64_t size,
                        const phi::Place& place, DType& dtype);

// The rotary table, or one for each sequence; a null one means no rotation, rotary_dim -1 the whole
// head. p.seqs is parsed already.
void ParseRotary(const char* op, const Tensor* table, bool neox, int rotary_dim,
                 const phi::Place& place, RopeWriteCacheParams& p);

float ParseEps(const char* op, float rms_norm_eps);

}  // namespace fastattn::api
