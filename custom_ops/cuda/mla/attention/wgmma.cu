// Dense latent attention on Hopper.
//
// A persistent CTA has tiles of 64 rows (heads of new tokens, token by token) and 64 keys. A tile
// of keys lies in shared memory once, as keys and as values. Warpgroups: the producer
// (wgmma_producer.cuh), and two consumers (wgmma_consumer.cuh) that have 256 of the 512 output
// channels each, 64 x 256 fp32 in registers; the left one also computes the scores.
//
// Barriers (mbarriers of Shared), a phase a tile:
//  - right_full/right_empty, left_full/left_empty: the tile's channels 256 to 511, which the right
//    consumer is the last to read, and the others, which only the left one reads behind the scores;
//  - weights_full/weights_empty: the weights and factors that the left consumer passes on.
#include <algorithm>
#include <type_traits>

#include "common/dispatch.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/mla/attention/launch.h"
#include "cuda/mla/attention/wgmma_consumer.cuh"
#include "cuda/mla/attention/wgmma_pairs.cuh"
#include "cuda/mla/attention/wgmma_producer.cuh"

namespace fastattn::cuda::mla_attention {

namespace {

template <class C>
__device__ __forceinline__ void InitShared(Shared<C>& shared) {
  for (int i = 0; i < kStages; ++i) {
    InitBarrier(&shared.right_full[i], C::kFullArrivals);
    InitBarrier(&shared.left_full[i], C::kFullArrivals);
    InitBarrier(&shared.right_empty[i], 4 * kWarpArrivals);
    InitBarrier(&shared.left_empty[i], 4 * kWarpArrivals);
    InitBarrier(&shared.weights_full[i], 4 * kWarpArrivals);
  }
  InitBarrier(&shared.weights_empty, 4 * kWarpArrivals);
  FenceBarrierInit();
}

// Calls f(segment, part) for every segment of this CTA.
template <class C, typename F>
__device__ __forceinline__ void ForSegments(const Arguments& args, const Shared<C>& shared, F&& f) {
  Walker<false> walker(args.p, args.plan, shared.share, blockIdx.x / args.plan.group_ctas);
  Segment segment;
  while (walker.Next(&segment)) {
    const Part part(args, segment);
    if (!part.none) f(segment, part);
  }
}

// Also notes the item that this group splits.
template <class C>
__device__ __forceinline__ void RunProducer(const Arguments& args, Shared<C>& shared) {
  if (C::kTma && threadIdx.x >= 32) return;
  Note note;
  const auto run = [&](auto& producer) {
    Walker<true> walker(args.p, args.plan, shared.share, blockIdx.x / args.plan.group_ctas);
    Segment segment;
    while (walker.Next(&segment)) {
      if (segment.merged > 0) {
        note = {segment.merged, segment.seq.q_begin, static_cast<int>(segment.row),
                segment.seq.q_len * args.p.heads};
      }
      const Part part(args, segment);
      if (!part.none) producer.Run(segment, part);
    }
  };
  if constexpr (C::kTma) {
    TmaProducer<C> producer(args, shared);
    run(producer);
  } else {
    CodeProducer<C> producer(args, shared);
    run(producer);
  }
  if (threadIdx.x == 0 && blockIdx.x % args.plan.group_ctas == 0) {
    WriteNote(WorkspaceOf(args.p, args.plan), blockIdx.x / args.plan.group_ctas, note);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    WgmmaKernel(const __grid_constant__ Arguments args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared<C>& shared = *reinterpret_cast<Shared<C>*>(memory);
  if (threadIdx.x == 0) {
    InitShared(shared);
    if constexpr (C::kTma) PrefetchMap(&args.keys);
  }
  PdlWait();
  PdlLaunchDependents();  // merge.cu's kernel takes the multiprocessors that this one leaves
  FindShare<C::kThreads>(args.p, args.plan, blockIdx.x / args.plan.group_ctas, shared.sums,
                         &shared.share);
  __syncthreads();
  if (threadIdx.x < C::kProducerThreads) {
    ReleaseRegisters<C::kProducerRegisters>();
    RunProducer(args, shared);
  } else if (threadIdx.x < C::kProducerThreads + 128) {
    ClaimRegisters<C::kLeftRegisters>();
    const Workspace workspace = WorkspaceOf(args.p, args.plan);
    std::conditional_t<C::kTakesPairs, PairConsumer<C, 0>, LeftConsumer<C>> consumer(args, shared);
    ForSegments(args, shared, [&](const Segment& segment, const Part& part) {
      consumer.Run(segment, part, workspace);
    });
  } else {
    ClaimRegisters<C::kRightRegisters>();
    const Workspace workspace = WorkspaceOf(args.p, args.plan);
    std::conditional_t<C::kTakesPairs, PairConsumer<C, 1>, RightConsumer<C>> consumer(args, shared);
    ForSegments(args, shared, [&](const Segment& segment, const Part& part) {
      consumer.Run(segment, part, workspace);
    });
  }
#else
  __trap();  // a build for sm_90 without its own features: better than output left unwritten
#endif
}

cudaError_t EncodeKeys(Arguments* args) {
  const MlaCache& cache = args->p.cache;
  const ByteTensor keys = {
      cache.data,
      {static_cast<uint64_t>(FactsOf(cache.format).row_bytes),
       static_cast<uint64_t>(cache.page_size), static_cast<uint64_t>(cache.num_pages)},
      {static_cast<uint64_t>(cache.row_stride), static_cast<uint64_t>(cache.page_stride)},
      {128, static_cast<uint32_t>(args->box_rows), 1},
      CU_TENSOR_MAP_SWIZZLE_128B};
  return EncodeMap(keys, &args->keys);
}

template <MlaFormat kFormat, bool kInPairs = false>
cudaError_t LaunchFormat(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                         cudaStream_t stream) {
  using C = Config<kFormat, kInPairs>;
  static_assert(sizeof(Shared<C>) <= 227 * 1024);
  DeviceFacts facts;
  cudaError_t status = AllowShared<WgmmaKernel<C>>(sizeof(Shared<C>), &facts);
  if (status != cudaSuccess) return status;
  Arguments args = {};
  args.p = p;
  args.plan = plan;
  args.page_size = Divisor(static_cast<uint32_t>(p.cache.page_size));
  args.box_rows = mla_attention_rows::BoxRows(p.cache);
  if constexpr (C::kTma) {
    status = EncodeKeys(&args);
    if (status != cudaSuccess) return status;
  }
  return LaunchPdlWithShared(WgmmaKernel<C>, dim3(plan.groups * plan.group_ctas), dim3(C::kThreads),
                             sizeof(Shared<C>), stream, args);
}

}  // namespace

cudaError_t LaunchWgmma(const MlaAttentionParams& p, const MlaAttentionPlan& plan,
                        cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  dispatch<MlaFormat::kBf16, MlaFormat::kFp8, MlaFormat::kFp8x656, MlaFormat::kFp8x584>(
      p.cache.format, "cache_format", [&](auto format) {
        constexpr MlaFormat kFormat = decltype(format)::value;
        if constexpr (kPairs && kFormat == MlaFormat::kBf16) {
          if (plan.group_ctas > 1) {
            status = LaunchFormat<kFormat, true>(p, plan, stream);
            return;
          }
        }
        status = LaunchFormat<kFormat>(p, plan, stream);
      });
  return status;
}

}  // namespace fastattn::cuda::mla_attention
