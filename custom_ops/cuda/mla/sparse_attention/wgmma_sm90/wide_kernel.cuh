// Sparse latent attention for groups of up to 64 heads of a query token: heads are the rows of the
// products.
//
// Warpgroups, four of them:
//  - consumer 0: S = Q K^T, softmax, O[:, 0..255] += P V;
//  - consumer 1: O[:, 256..511] += P V, with P and the rescaling factors from shared memory;
//  - two of producers (gather.cuh), which fill stages of 64 keys.
//
// Two CTAs of a cluster may have two groups of a query token: each gathers, and converts, half of
// each tile, and copies it into the other's stage (pair.cuh).
//
// The producers are ahead: they fill stages for the next work tile during the epilogue.
//
// Barriers (mbarriers): full/empty of the stages; probabilities_full/probabilities_empty of P.
// Named barriers: 1: the query lies in shared memory; 2: factors of the epilogue do, and the query
// has been read.
#pragma once

#include <cstdint>

#include "cuda/common/pdl.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/gather.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/wide_consumer.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

template <int kDim, MlaFormat kFormat>
__global__ void __launch_bounds__(kWideThreads, 1)
    WideKernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<WideShared<kDim, kFormat>*>(bytes);
  if (threadIdx.x == 0) InitBarriers<false>(shared);
  __syncthreads();
  PdlWait();
  PdlLaunchDependents();
  if (threadIdx.x >= 256) {
    ReleaseRegisters<kProducerRegisters>();
    Gather<kDim, kFormat, kWideProducers, kWideStages, kKeys, kWideSlots<kFormat>> gather(
        args, shared.stages.keys[0], shared.barriers, threadIdx.x - 256, 0, shared.slots);
    for (unsigned index = blockIdx.x; index < args.work_tiles; index += gridDim.x) {
      gather.Run(Work(args, index, kWideHeads));
    }
  } else if (threadIdx.x < 128) {
    ClaimRegisters<kScoreRegisters>();
    WideConsumer<kDim, kFormat, false> c(args, shared);
    c.template Run<0>();
  } else {
    ClaimRegisters<kOutputRegisters>();
    WideConsumer<kDim, kFormat, false> c(args, shared);
    c.template Run<1>();
  }
#else
  __trap();
#endif
}

// Two CTAs of a cluster with neighbouring groups of heads of a query token: each gathers, and
// converts, half of each tile for both.
template <int kDim, MlaFormat kFormat>
__global__ void __launch_bounds__(kWideThreads, 1)
    WidePairKernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t bytes[];
  auto& shared = *reinterpret_cast<WideShared<kDim, kFormat>*>(bytes);
  const int rank = static_cast<int>(ClusterRank());
  if (threadIdx.x == 0) InitBarriers<true>(shared);
  SyncCluster();
  PdlWait();
  PdlLaunchDependents();
  if (threadIdx.x >= 384) {
    ReleaseRegisters<kPairSenderRegisters>();
    if (threadIdx.x < 416) {
      PairSender<kDim, kWideStages> sender(shared.stages.keys[0], shared.barriers, rank);
      for (unsigned index = blockIdx.x; index < args.work_tiles; index += gridDim.x) {
        sender.Run(Work(args, index, kWideHeads));
      }
    }
  } else if (threadIdx.x >= 256) {
    ReleaseRegisters<kPairProducerRegisters>();
    Gather<kDim, kFormat, kPairProducers, kWideStages, kKeys / 2> gather(
        args, shared.stages.keys[0], shared.barriers, threadIdx.x - 256, kKeys / 2 * rank);
    for (unsigned index = blockIdx.x; index < args.work_tiles; index += gridDim.x) {
      gather.Run(Work(args, index, kWideHeads));
    }
  } else if (threadIdx.x < 128) {
    ClaimRegisters<kScoreRegisters>();
    WideConsumer<kDim, kFormat, true> c(args, shared);
    c.template Run<0>();
  } else {
    ClaimRegisters<kOutputRegisters>();
    WideConsumer<kDim, kFormat, true> c(args, shared);
    c.template Run<1>();
  }
  SyncCluster();  // the other CTA may still arrive here
#else
  __trap();
#endif
}

}  // namespace fastattn::cuda::mla_sparse_sm90
