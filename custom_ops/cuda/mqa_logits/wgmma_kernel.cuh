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

// By all warps but the first, each some of the barriers: a warp would take longer for all of them
// than the lengths take to come.
template <class C>
__device__ __forceinline__ void InitShared(const Arguments& arguments, Shared<C>& shared) {
  constexpr int kPreparing = kPreparers<C> * kWarpArrivals, kWarps = C::kThreads / 32 - 1;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - 1;
  if (!ElectOne()) return;
  if (warp == 0) {
    if constexpr (C::kFp8 || !C::kPaged) PrefetchMap(&arguments.key);
    if constexpr (C::kFp8) PrefetchMap(&arguments.query);
    if constexpr (!C::kPaged) PrefetchMap(&arguments.key_scales);
  }
  if (warp == 1 || warp == 2) {
    const int buffer = warp - 1;
    InitBarrier(&shared.segment_found[buffer], 1);
    InitBarrier(&shared.query_full[buffer], 1 + kPreparing);
    InitBarrier(&shared.query_empty[buffer], 4 * C::kConsumers * kWarpArrivals + kPreparing);
  }
#pragma unroll 1
  for (int stage = kWarps - 1 - warp; stage < C::kStages; stage += kWarps) {
    InitBarrier(&shared.key_full[stage], 1);
    InitBarrier(&shared.key_empty[stage], 4 * kWarpArrivals);
  }
  FenceBarrierInit();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    WgmmaKernel(const __grid_constant__ Arguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kMany = kKnownGroups / 32;
  Lengths<1> few;
  Lengths<kMany> many;
  bool known = false, known_few = false;
  if constexpr (C::kPaged) {
    const LogitsParams p = KnownParams<C>(arguments.p);
    const LogitsGroups groups = KnownGroups<C>(arguments.groups);
    known_few = few.Known(p, groups), known = known_few || many.Known(p, groups);
    if (warp == 0) {  // on their way while others prepare the shared memory
      PdlWait();
      if (known_few) {
        few.Load(p, groups, lane);
      } else if (known) {
        many.Load(p, groups, lane);
      }
    }
  }
  if (warp > 0) InitShared(arguments, shared);
  if (!C::kFp8 && warp == 3) FillMagnitudes(shared.magnitudes, lane);
  if (C::kPaged && threadIdx.x >= 128) {
    PrefetchInputs(arguments.p, threadIdx.x - 128, C::kThreads - 128);
  }
  PdlWait();
  __syncthreads();
  PdlLaunchDependents();  // the next kernel takes the multiprocessors that this one leaves
  if constexpr (!C::kPaged) FindShare(arguments.p, arguments.groups, shared);
  if (threadIdx.x < 128) {
    ReleaseRegisters<C::kProducerRegisters>();
    if (warp > 0) {
      RunOthers(arguments, shared);
      return;
    }
    Loader<C> loader(arguments, shared, known);
    Share share;
    if constexpr (C::kPaged) {
      const LogitsParams p = KnownParams<C>(arguments.p);
      const LogitsGroups groups = KnownGroups<C>(arguments.groups);
      const int most = arguments.most_keys;
      share = known_few ? FindKnownShare<C>(p, groups, few, most, lane, shared.group_tiles)
              : known   ? FindKnownShare<C>(p, groups, many, most, lane, shared.group_tiles)
                        : FindShareOfWarp<C>(p, groups, lane);
    } else {
      share = shared.share;
    }
    loader.Run(share);
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
