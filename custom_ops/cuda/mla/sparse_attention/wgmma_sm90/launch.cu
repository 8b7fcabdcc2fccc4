#include "cuda/mla/sparse_attention/wgmma_sm90/launch.h"

#include <algorithm>
#include <tuple>

#include "cuda/common/device_facts.h"
#include "cuda/common/launch.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/instances.h"
#include "cuda/mla/sparse_attention/wgmma_sm90/merge.cuh"
#include "cuda/mla/sparse_attention/wgmma_sm90/work.cuh"

namespace fastattn::cuda::mla_sparse_sm90 {

namespace {

constexpr int kFixedTiles = 3;  // what a CTA costs beside its tiles, in tiles
// Setting up clusters, and ending together, takes 3 us, which fewer tiles do not save.
constexpr int kPairTiles = 48;  // of a multiprocessor, at least

bool SelectionFits(const MlaSelection& s, int dim) {
  const MlaCache& c = s.cache;
  const auto aligned = [](int64_t x) { return x % 16 == 0; };
  // The kernels have places of 32 bits, in units of 8 bytes.
  const bool small =
      (c.num_pages - 1) <= (int64_t{1} << 34) / std::max<int64_t>(c.page_stride, 1) &&
      c.page_size * c.row_stride <= int64_t{1} << 33;
  const bool eight = c.format != MlaFormat::kFp8x584 || c.ScalePlane() % 8 == 0;
  const bool format = c.format == MlaFormat::kFp8x528   ? false
                      : c.format == MlaFormat::kFp8x584 ? dim == 512
                      : c.format == MlaFormat::kFp8x656 ? dim == 576
                                                        : dim == 576 || dim == 512;
  return format && eight && small && aligned(reinterpret_cast<intptr_t>(c.data)) &&
         aligned(c.page_stride) && aligned(c.row_stride);
}

int HeadsOf(int heads) { return heads <= 8 ? 8 : heads <= 16 ? 16 : 64; }

int Tiles(int topk) { return (topk + kKeys - 1) / kKeys; }

// Splits of each token's keys: as many as make the call shortest, in tiles that the busiest
// multiprocessor goes through.
int Splits(const MlaSparseParams& p, int processors) {
  if (p.max_logits != nullptr) return 1;  // it is not among the partial results
  const int64_t group = HeadsOf(p.heads);
  const int64_t items = p.tokens * ((p.heads + group - 1) / group);
  const int tiles = Tiles(p.keys.topk) + Tiles(p.extra.topk);
  // Only what merges splits writes fp32.
  const int fewest = p.out_float != nullptr ? 2 : 1;
  int best = fewest;
  int64_t least = INT64_MAX;
  for (int splits = fewest; splits <= std::min(tiles, kMaxSplits); ++splits) {
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

// Key tiles that all CTAs go through, at most.
int64_t TilesOfAll(const MlaSparseParams& p, const Arguments& args) {
  return p.tokens * args.head_groups * (Tiles(p.keys.topk) + Tiles(p.extra.topk));
}

int64_t LseBytes(const MlaSparseParams& p, int splits) {
  return (p.tokens * p.heads * splits * 4 + 255) / 256 * 256;
}

}  // namespace

bool Takes(const MlaSparseParams& p) {
  const auto aligned = [](int64_t x) { return x % 8 == 0; };
  return p.heads > 0 && (p.out_float == nullptr || p.max_logits == nullptr) &&
         (p.dim == 576 || p.dim == 512) && SelectionFits(p.keys, p.dim) &&
         (p.extra.topk == 0 ||
          (SelectionFits(p.extra, p.dim) && p.extra.cache.format == p.keys.cache.format)) &&
         reinterpret_cast<intptr_t>(p.q) % 16 == 0 && reinterpret_cast<intptr_t>(p.out) % 16 == 0 &&
         aligned(p.q_token_stride) && aligned(p.q_head_stride);
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
  args.work_tiles = GridSize(p.tokens * args.head_groups * args.splits);
  args.pairs = args.head_groups % 2 == 0 && TilesOfAll(p, args) >= kPairTiles * facts.processors;
  if (args.splits > 1) {
    if (workspace == nullptr) return cudaErrorInvalidValue;
    args.partial_lse = static_cast<float*>(workspace);
    args.partial =
        reinterpret_cast<float*>(static_cast<char*>(workspace) + LseBytes(p, args.splits));
  }
  dispatch(
      Instances{},
      std::tuple{Wanted{"format", p.keys.cache.format}, Wanted{"dim", p.dim},
                 Wanted{"heads", group}},
      [&](auto... values) { status = LaunchVariant<decltype(values)::value...>(args, stream); });
  if (status != cudaSuccess || args.splits == 1) return status;
  return LaunchPdl(MergeKernel, dim3(GridSize(p.tokens * p.heads)), dim3(kMergeThreads), stream,
                   args);
}

}  // namespace fastattn::cuda::mla_sparse_sm90
