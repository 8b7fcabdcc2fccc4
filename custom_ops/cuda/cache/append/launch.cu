#include "cuda/cache/append/launch.h"

#include "common/dispatch.h"

namespace fastattn::cuda {

cudaError_t LaunchAppendCache(const AppendCacheParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  const auto launch = [&](auto code, auto dynamic_quant) {
    dispatch<CacheLayout::kFastattn, CacheLayout::kFastDeploy>(
        p.cache.layout, "cache_layout", [&](auto layout) {
          status = LaunchAppendCacheVariant<decltype(code)::value, decltype(dynamic_quant)::value,
                                            decltype(layout)::value>(p, stream);
        });
  };
  if (p.dynamic_quant) {
    dispatch<DType::kE4M3, DType::kInt8>(p.cache.dtype, "dynamic codes",
                                         [&](auto code) { launch(code, std::true_type{}); });
  } else {
    dispatch<DType::kE4M3, DType::kE5M2, DType::kInt8>(
        p.cache.dtype, "codes", [&](auto code) { launch(code, std::false_type{}); });
  }
  return status;
}

}  // namespace fastattn::cuda
