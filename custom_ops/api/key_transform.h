// k_rotation, k_center and k_feedback: what is done to K before and while it is quantised.
#pragma once

#include <string>

#include "api/check.h"
#include "api/paged_cache.h"
#include "params/common.h"
#include "params/key_transform.h"

namespace fastattn::api {

// An option k_rotation or q_rotation.
inline KeyRotation ParseRotation(const char* op, const char* name, const std::string& rotation) {
  for (KeyRotation known : {KeyRotation::kNone, KeyRotation::kHadamard}) {
    if (rotation == NameOf(known)) return known;
  }
  Fail("ValueError", op, name, "expected none or hadamard, got '", rotation, "'");
}

// `cache` has been checked.
inline const float* ParseKeyFeedback(const char* op, const Tensor& k_feedback,
                                     const PagedCache& cache, const phi::Place& place) {
  constexpr const char* kName = "k_feedback";
  if (!IsQuantized(cache.type) || HasGroupScales(cache.type)) {
    Fail("NotImplementedError", op, kName, "cache_quant_type '", NameOf(cache.type),
         "' is not supported; supported: types with a scale for each head or token");
  }
  if (cache.dtype == DType::kE5M2) {
    Fail("NotImplementedError", op, kName, "fp8_format 'e5m2' is not supported; supported: e4m3");
  }
  if (cache.k_granularity == ScaleScheme::kChannel) {
    Fail("NotImplementedError", op, kName,
         "scales of channels are not supported; supported: cache_k_scales of [1] or [KV]");
  }
  Arg(op, kName, k_feedback)
      .On(place)
      .Dtype({phi::DataType::FLOAT32})
      .Dims({cache.num_kv_heads, cache.head_dim, cache.head_dim})
      .Contiguous();
  RequireAligned(op, kName, k_feedback, kVectorBytes);
  return Data<float>(k_feedback);
}

// `cache` has been checked. Readers pass no k_feedback.
inline KeyTransform ParseKeyTransform(const char* op, const Tensor* k_center,
                                      const std::string& k_rotation, const PagedCache& cache,
                                      const phi::Place& place, const Tensor* k_feedback = nullptr) {
  KeyTransform transform;
  transform.rotation = ParseRotation(op, "k_rotation", k_rotation);
  const bool rotates = transform.rotation != KeyRotation::kNone;
  const char* given = rotates ? "k_rotation" : "k_center";
  if ((rotates || k_center != nullptr) && !IsQuantized(cache.type)) {
    Fail("NotImplementedError", op, given, "cache_quant_type '", NameOf(cache.type),
         "' is not supported; supported: ", QuantizedTypeNames());
  }
  if ((rotates || k_center != nullptr) && cache.dtype == DType::kE5M2) {
    Fail("NotImplementedError", op, given, "fp8_format 'e5m2' is not supported; supported: e4m3");
  }
  if (k_center != nullptr) {
    Arg(op, "k_center", *k_center)
        .On(place)
        .Dtype({phi::DataType::FLOAT32})
        .Dims({cache.num_kv_heads, cache.head_dim})
        .Contiguous();
    RequireAligned(op, "k_center", *k_center, kVectorBytes);
    transform.center = Data<float>(*k_center);
  }
  if (k_feedback != nullptr) {
    transform.feedback = ParseKeyFeedback(op, *k_feedback, cache, place);
  }
  return transform;
}

}  // namespace fastattn::api
