#include "cuda/sparse_attention/launch.h"

#include <tuple>

#include "cuda/sparse_attention/instances.h"

namespace fastattn::cuda {

cudaError_t LaunchSparseAttention(const SparseAttentionParams& p, cudaStream_t stream) {
  const AttentionParams& a = p.attention;
  if (a.seqs.num_tokens == 0 || a.num_heads == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  const bool grouped = HasGroupScales(a.cache.type);
  const std::tuple wanted{
      Wanted{"elements of the cache", a.cache.dtype}, Wanted{"values", a.cache.value_dtype},
      Wanted{"scales of the cache", grouped ? FormatOf(a.cache.type).scales : Scales::kStatic}};
  dispatch(SparseInstances{}, wanted, [&](auto... arguments) {
    status = LaunchSparseVariant<decltype(arguments)::value...>(p, stream);
  });
  return status;
}

}  // namespace fastattn::cuda
