#include "cuda/cache/append/launch.h"

#include <tuple>

#include "cuda/cache/append/instances.h"

namespace fastattn::cuda {

cudaError_t LaunchAppendCache(const AppendCacheParams& p, cudaStream_t stream) {
  cudaError_t status = cudaErrorInvalidValue;
  const std::tuple wanted{Wanted{p.dynamic_quant ? "dynamic codes" : "codes", p.cache.dtype},
                          Wanted{"codes of V", p.cache.value_dtype},
                          Wanted{"scales of the cache", FormatOf(p.cache.type).scales},
                          Wanted{"cache_layout", p.cache.layout}};
  dispatch(AppendCacheInstances{}, wanted, [&](auto... arguments) {
    status = LaunchAppendCacheVariant<decltype(arguments)::value...>(p, stream);
  });
  return status;
}

}  // namespace fastattn::cuda
