// Parsing and checking of latent caches, for every operator that takes one.
#pragma once

#include <string>

#include "api/check.h"
#include "params/mla_cache.h"

namespace fastattn::api {

// What an operator calls the arguments of a cache.
struct MlaNames {
  const char* cache = "cache";
  const char* format = "cache_format";
  const char* page_size = "page_size";
  const char* scale = "scale";
};

MlaFormat ParseMlaFormat(const char* op, const std::string& name, const MlaNames& names = {});

// Checks shape, dtype, place, strides and address and fills an MlaCache. A cache of two dimensions
// needs `page_size`; with others it is 0 or what the shape says. A cache without a slot has no
// pages. Rows of kBf16 have `bf16_channels`.
MlaCache ParseMlaCache(const char* op, const Tensor& cache, MlaFormat format, int page_size,
                       const phi::Place& place, const MlaNames& names = {},
                       int bf16_channels = 576);

// The static scale, which kFp8 needs and no other format takes.
const float* ParseMlaScale(const char* op, const Tensor* scale, MlaFormat format,
                           const phi::Place& place, const MlaNames& names = {});

}  // namespace fastattn::api
