#include "cuda/mla/attention/wgmma_sm90/launch.h"

#include <algorithm>

#include "cuda/common/device_facts.h"
#include "cuda/common/launch.cuh"
#include "cuda/mla/attention/wgmma_sm90/combine.cuh"
#include "cuda/mla/attention/wgmma_sm90/narrow_kernel.cuh"
#include "cuda/mla/attention/wgmma_sm90/wide_kernel.cuh"

namespace fastattn::cuda::mla_sm90 {

namespace {

constexpr bool kShareTiles = true;  // two groups of heads gather each tile once
constexpr int kFixedTiles = 3;  // what a CTA costs beside its tiles, in tiles

bool SelectionFits(const MlaSelection& s, int dim) {
  const MlaCache& c = s.cache;
  const auto aligned = [](int64_t x) { return x % 16 == 0; };
  const bool eight = c.format != MlaFormat::kFp8x584 || c.ScalePlane() % 8 == 0;
  const bool format = c.format == MlaFormat::kFp8x584   ? dim == 512
                      : c.format == MlaFormat::kFp8x656 ? dim == 576
                                                        : dim == 576 || dim == 512;
  return format && eight && aligned(reinterpret_cast<intptr_t>(c.data)) && aligned(c.page_stride) &&
         aligned(c.row_stride);
}

int HeadsOf(int heads) { return heads <= 8 ? 8 : heads <= 16 ? 16 : kWideHeads; }

int Tiles(int topk) { return (topk + kKeys - 1) / kKeys; }

// Splits of each token's keys: as many as make the call shortest, in tiles that the busiest
// multiprocessor goes through.
int Splits(const MlaSparseParams& p, int processors) {
  const int64_t group = HeadsOf(p.heads);
  const int64_t items = p.tokens * ((p.heads + group - 1) / group);
  const int tiles = Tiles(p.keys.topk) + Tiles(p.extra.topk);
  int best = 1;
  int64_t least = INT64_MAX;
  for (int splits = 1; splits <= std::min(tiles, kMaxSplits); ++splits) {
    const int64_t waves = (items * splits + processors - 1) / processors;
    const int64_t cost =
        waves * ((tiles + splits - 1) / splits + kFixedTiles) + (splits > 1 ? kFixedTiles : 0);
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

int64_t LseBytes(const MlaSparseParams& p, int splits) {
  return (p.tokens * p.heads * splits * 4 + 255) / 256 * 256;
}

template <auto kKernel, int kThreads, class Shared, int kCluster = 1>
cudaError_t LaunchOne(const Arguments& args, int device, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 * 1024);
  static OncePerDevice once;
  const cudaError_t status = once.Run(device, [] {
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(sizeof(Shared)));
  });
  if (status != cudaSuccess) return status;
  const unsigned grid = GridSize(args.p.tokens * args.head_groups * args.splits);
  return LaunchPdlInClusters(kKernel, dim3(grid), dim3(kThreads), kCluster, sizeof(Shared), stream,
                             args);
}

template <int kDim, MlaFormat kFormat>
cudaError_t LaunchFormat(const Arguments& args, int device, cudaStream_t stream) {
  const int heads = HeadsOf(args.p.heads);
  if (heads == 8) {
    return LaunchOne<NarrowKernel<kDim, kFormat, 8>, kNarrowThreads, NarrowShared<kDim, 8>>(
        args, device, stream);
  }
  if (heads == 16) {
    return LaunchOne<NarrowKernel<kDim, kFormat, 16>, kNarrowThreads, NarrowShared<kDim, 16>>(
        args, device, stream);
  }
  if (kShareTiles && args.head_groups == 2) {
    return LaunchOne<WideKernel<kDim, kFormat, 2>, kWideThreads, WideShared<kDim>, 2>(args, device,
                                                                                      stream);
  }
  return LaunchOne<WideKernel<kDim, kFormat, 1>, kWideThreads, WideShared<kDim>>(args, device,
                                                                                 stream);
}

template <MlaFormat kFormat>
cudaError_t LaunchDim(const Arguments& args, int device, cudaStream_t stream) {
  if (args.p.dim == 512) return LaunchFormat<512, kFormat>(args, device, stream);
  return LaunchFormat<576, kFormat>(args, device, stream);
}

cudaError_t LaunchMain(const Arguments& args, int device, cudaStream_t stream) {
  switch (args.p.keys.cache.format) {
    case MlaFormat::kBf16:
      return LaunchDim<MlaFormat::kBf16>(args, device, stream);
    case MlaFormat::kFp8:
      return LaunchDim<MlaFormat::kFp8>(args, device, stream);
    case MlaFormat::kFp8x656:
      return LaunchFormat<576, MlaFormat::kFp8x656>(args, device, stream);
    case MlaFormat::kFp8x584:
      return LaunchFormat<512, MlaFormat::kFp8x584>(args, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool Takes(const MlaSparseParams& p) {
  const auto aligned = [](int64_t x) { return x % 8 == 0; };
  return p.heads > 0 && (p.dim == 576 || p.dim == 512) && SelectionFits(p.keys, p.dim) &&
         (p.extra.topk == 0 || (SelectionFits(p.extra, p.dim) &&
                                p.extra.cache.format == p.keys.cache.format)) &&
         reinterpret_cast<intptr_t>(p.q) % 16 == 0 && aligned(p.q_token_stride) &&
         aligned(p.q_head_stride);
}

int64_t WorkspaceBytes(const MlaSparseParams& p, int processors) {
  const int splits = Splits(p, processors);
  if (splits <= 1) return 0;
  return LseBytes(p, splits) + p.tokens * p.heads * splits * kMlaValueDim * 4;
}

cudaError_t Launch(const MlaSparseParams& p, void* workspace, cudaStream_t stream) {
  if (p.tokens == 0) return cudaSuccess;
  int device = 0;
  DeviceFacts facts;
  cudaError_t status = GetCurrentDevice(&device, &facts);
  if (status != cudaSuccess) return status;
  Arguments args;
  args.p = p;
  args.page_size[0] = Divisor(static_cast<uint32_t>(p.keys.cache.page_size));
  args.page_size[1] = Divisor(static_cast<uint32_t>(p.extra.cache.page_size));
  const int group = HeadsOf(p.heads);
  args.head_groups = (p.heads + group - 1) / group;
  args.splits = Splits(p, facts.processors);
  if (args.splits > 1) {
    args.partial_lse = static_cast<float*>(workspace);
    args.partial = reinterpret_cast<float*>(static_cast<char*>(workspace) +
                                            LseBytes(p, args.splits));
  }
  status = LaunchMain(args, device, stream);
  if (status != cudaSuccess || args.splits == 1) return status;
  return LaunchPdl(CombineKernel, dim3(GridSize(p.tokens * p.heads)), dim3(kCombineThreads), stream,
                   args);
}

}  // namespace fastattn::cuda::mla_sm90
