// Parsing and checking of latent caches, for every operator that takes one.
#pragma once

#include <string>

#include "api/check.h"
#include "params/mla_cache.h"

namespace fastattn::api {

MlaFormat ParseMlaFormat(const char* op, const std::string& name);

// Checks shape, dtype, place, strides and address and fills an MlaCache. A cache of two dimensions
// needs `page_size`; with others it is 0 or what the shape says. A cache without a slot has no
// pages.
MlaCache ParseMlaCache(const char* op, const Tensor& cache, MlaFormat format, int page_size,
                       const phi::Place& place);

// The static scale, which kFp8 needs and no other format takes.
const float* ParseMlaScale(const char* op, const Tensor* scale, MlaFormat format,
                           const phi::Place& place);

}  // namespace fastattn::api
