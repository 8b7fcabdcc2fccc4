#include "cuda/mqa_logits/mma.h"

#include <algorithm>

#include "cuda/common/launch.cuh"
#include "cuda/mqa_logits/mma_kernel.cuh"

namespace fastattn::cuda::mqa_logits {

namespace {

template <IndexerQuant kQuant, int kDim>
cudaError_t LaunchMmaVariant(const LogitsParams& p, cudaStream_t stream) {
  using Head = MmaHead<kDim>;
  const int rows = std::clamp(128 / p.num_heads, 1, p.paged ? static_cast<int>(p.next_n) : 8);
  const LogitsGroups groups(p, rows);
  const int64_t keys = p.paged ? p.columns : p.num_keys;
  const int64_t chunks = std::max<int64_t>((keys + kMmaChunk - 1) / kMmaChunk, 1);
  constexpr int kMostShared = kLogitsMaxHeads * (sizeof(Head) + sizeof(float));
  DeviceFacts facts;
  const cudaError_t status = AllowShared<MmaKernel<kQuant, kDim>>(kMostShared, &facts);
  if (status != cudaSuccess) return status;
  const size_t shared = static_cast<size_t>(rows) * p.num_heads * (sizeof(Head) + sizeof(float));
  return LaunchPdlWithShared(MmaKernel<kQuant, kDim>, dim3(GridSize(groups.count * chunks)),
                             dim3(32 * kMmaWarps), shared, stream, p, groups,
                             static_cast<int>(chunks));
}

}  // namespace

cudaError_t LaunchMma(const LogitsParams& p, cudaStream_t stream) {
  const bool fp8 = p.quant == IndexerQuant::kFp8;
  if (p.head_dim == 128) {
    return fp8 ? LaunchMmaVariant<IndexerQuant::kFp8, 128>(p, stream)
               : LaunchMmaVariant<IndexerQuant::kMxfp4, 128>(p, stream);
  }
  return fp8 ? LaunchMmaVariant<IndexerQuant::kFp8, 64>(p, stream)
             : LaunchMmaVariant<IndexerQuant::kMxfp4, 64>(p, stream);
}

}  // namespace fastattn::cuda::mqa_logits
