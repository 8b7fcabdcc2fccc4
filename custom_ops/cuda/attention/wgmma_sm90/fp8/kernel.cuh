// FP8 attention of long query rows on Hopper: TMA, WGMMA, warp specialisation, persistent CTAs.
// docs/kernels.md explains the pipeline.
#pragma once

#include "cuda/attention/wgmma_sm90/common/launch_persistent.h"
#include "cuda/attention/wgmma_sm90/fp8/consumer.cuh"
#include "cuda/attention/wgmma_sm90/fp8/producer.cuh"
#include "cuda/attention/wgmma_sm90/fp8/variant.h"

namespace fastattn::cuda::wgmma_fp8 {

// 64 K registers: 128 threads of the producer and 256 consumers.
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;

template <class C>
__device__ __forceinline__ void InitBarriers(Shared<C>& shared) {
  constexpr int kWarps = 4 * C::kConsumers * kWarpArrivals;
  constexpr int kCleaners = C::kCleaners * kWarpArrivals;
  for (int i = 0; i < 2; ++i) {
    InitBarrier(&shared.tile_found[i], 1);
    InitBarrier(&shared.query_full[i], 1 + kCleaners);
    InitBarrier(&shared.query_empty[i], kWarps + kCleaners);
  }
  for (int i = 0; i < C::kStages; ++i) {
    InitBarrier(&shared.key_full[i], 1);
    InitBarrier(&shared.key_empty[i], kWarps);
    InitBarrier(&shared.value_full[i], 1);
    InitBarrier(&shared.value_ready[i], kCleaners);
    InitBarrier(&shared.value_empty[i], kWarps);
    shared.nan_found[i][3] = 0;
  }
  FenceBarrierInit();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    Kernel(const __grid_constant__ Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
  if (threadIdx.x == 0) InitBarriers(shared);
  __syncthreads();
  PdlWait();
  PdlLaunchDependents();  // it takes the multiprocessors that this one leaves
  if (threadIdx.x < 128) {
    ReleaseRegisters<kProducerRegisters>();
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) {
        PrefetchMap(&arguments.query);
        PrefetchMap(&arguments.key);
        PrefetchMap(&arguments.value);
      }
      __syncwarp();
      Loader<C>(arguments, shared).Run();
    } else {
      Cleaner<C>(arguments, shared).Run();
    }
  } else {
    ClaimRegisters<kConsumerRegisters>();
    Consumer<C>(arguments, shared).Run();
  }
#else
  __trap();  // a build for sm_90 without its own features; rather than leaving rows unwritten
#endif
}

template <int kDim, bool kTokenScales, bool kSoftcap, DType kCodes>
cudaError_t LaunchVariant(const Arguments& arguments, cudaStream_t stream) {
  using C = Config<kDim, kTokenScales, kSoftcap, kCodes>;
  return LaunchPersistent<Kernel<C>, C, Shared<C>>(arguments, stream);
}

}  // namespace fastattn::cuda::wgmma_fp8
