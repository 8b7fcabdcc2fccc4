// The logits on Hopper: e4m3 matrix products with keys as rows and heads as columns.
//
// Groups of queries (kColumns / kHeads of them, of one sequence where paged) meet tiles of 64 keys.
// All tiles of all groups, one group after the other, are shared out evenly among persistent CTAs
// (schedule.cuh). Every cell is written once: cells that a query sees by the tile's warpgroup, all
// others by warps of the producer that have nothing else to do.
//
// Warps: producer.cuh has the first four; two to four warpgroups of consumers (consumer.cuh) take
// tiles in turn.
//
// Barriers (mbarriers of Shared):
//  - segment_found, query_full/query_empty: two buffers of a group's queries, weights and ranges;
//  - key_full/key_empty: kStages tiles of keys and their scales.
//
// FP8 operands come from shared memory. MXFP4 keys become e4m3 in registers, MXFP4 queries in
// shared memory (e2m1_operand.cuh).
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mqa_logits/consumer.cuh"
#include "cuda/mqa_logits/producer.cuh"

namespace fastattn::cuda::mqa_logits {

// By one warp.
template <class C>
__device__ __forceinline__ void InitShared(const Arguments& arguments, Shared<C>& shared,
                                           int lane) {
  constexpr int kPreparing = kPreparers<C> * kWarpArrivals;
  static_assert(C::kStages <= 32);
  if (lane < 2) {
    InitBarrier(&shared.segment_found[lane], 1);
    InitBarrier(&shared.query_full[lane], 1 + kPreparing);
    InitBarrier(&shared.query_empty[lane], 4 * C::kConsumers * kWarpArrivals + kPreparing);
  }
  if (lane < C::kStages) {
    InitBarrier(&shared.key_full[lane], 1);
    InitBarrier(&shared.key_empty[lane], 4 * kWarpArrivals);
  }
  FenceBarrierInit();
  if (lane == 0) {
    if constexpr (C::kFp8 || !C::kPaged) PrefetchMap(&arguments.key);
    if constexpr (C::kFp8) PrefetchMap(&arguments.query);
    if constexpr (!C::kPaged) PrefetchMap(&arguments.key_scales);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    WgmmaKernel(const __grid_constant__ Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 2) InitShared(arguments, shared, lane);
  if (!C::kFp8 && warp == 3) FillMagnitudes(shared.magnitudes, lane);
  PdlWait();
  PdlLaunchDependents();  // the next kernel takes the multiprocessors that this one leaves
  Share share;
  if constexpr (C::kPaged) {
    if (warp == 0) {  // while others prepare the shared memory
      share =
          FindShareOfWarp<C>(KnownParams<C>(arguments.p), KnownGroups<C>(arguments.groups), lane);
    } else {
      PrefetchInputs(arguments.p, threadIdx.x - 32, C::kThreads - 32);
    }
    __syncthreads();
  } else {
    FindShare(arguments.p, arguments.groups, shared);
    share = shared.share;
  }
  if (threadIdx.x < 128) {
    ReleaseRegisters<C::kProducerRegisters>();
    RunProducer(arguments, shared, share);
  } else {
    ClaimRegisters<C::kConsumerRegisters>();
    Consumer<C>(arguments, shared).Run();
  }
#else
  __trap();  // a build for sm_90 without its own features: better than output left unwritten
#endif
}

template <IndexerQuant kQuant, bool kPaged, int kHeads, int kColumns>
cudaError_t LaunchLogitsVariant(const Arguments& arguments, cudaStream_t stream) {
  using C = Config<kQuant, kPaged, kHeads, kColumns>;
  static_assert(sizeof(Shared<C>) <= 227 * 1024);
  DeviceFacts facts;
  const cudaError_t status = AllowShared<WgmmaKernel<C>>(sizeof(Shared<C>), &facts);
  if (status != cudaSuccess) return status;
  return LaunchPdlWithShared(WgmmaKernel<C>, dim3(facts.processors), dim3(C::kThreads),
                             sizeof(Shared<C>), stream, arguments);
}

}  // namespace fastattn::cuda::mqa_logits
