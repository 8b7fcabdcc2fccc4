#include "cuda/attention/launch.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "common/ceil_div.h"
#include "cuda/attention/mma_sm80/general/instances.h"
#include "cuda/attention/mma_sm80/instances.h"
#include "cuda/attention/mma_sm80/invariant/instances.h"
#include "cuda/attention/mma_sm80/launch.h"
#include "cuda/attention/split_kv/launch.h"
#include "cuda/attention/wgmma_sm90/fp8/launch.h"
#include "cuda/attention/wgmma_sm90/q16/launch.h"

namespace fastattn::cuda {

namespace {

using Launcher = cudaError_t (*)(const AttentionParams&, const AttentionTask&, int, cudaStream_t);

Scales ScalesOf(const AttentionParams& p) {
  return p.paged ? FormatOf(p.cache.type).scales : Scales::kStatic;
}

Launcher FindGeneral(const AttentionParams& p, int tile_rows) {
  const bool dynamic = IsDynamic(p.cache.type);
  const std::tuple wanted{Wanted{dynamic ? "dynamic codes" : "cache on a GPU", p.cache.dtype},
                          Wanted{"values", p.cache.value_dtype}, Wanted{"head_dim", p.head_dim},
                          Wanted{"scales of the cache", ScalesOf(p)},
                          Wanted{"tile_rows", tile_rows}};
  Launcher found = nullptr;
  dispatch(GeneralInstances{}, wanted,
           [&](auto... arguments) { found = LaunchGeneralVariant<decltype(arguments)::value...>; });
  return found;
}

Launcher FindMmaSm80(const AttentionParams& p, int tile_rows) {
  if (p.IsGeneral()) return FindGeneral(p, tile_rows);
  const bool dynamic = p.paged && IsDynamic(p.cache.type);
  const char* keys = dynamic ? "dynamic codes" : p.paged ? "cache on a GPU" : "keys on a GPU";
  const std::tuple wanted{Wanted{keys, p.paged ? p.cache.dtype : p.ragged.dtype},
                          Wanted{"values", p.paged ? p.cache.value_dtype : p.ragged.dtype},
                          Wanted{"head_dim", p.head_dim},
                          Wanted{"paged", p.paged},
                          Wanted{"scales of the cache", ScalesOf(p)},
                          Wanted{"tile_rows", tile_rows}};
  Launcher found = nullptr;
  dispatch(AttentionInstances{}, wanted, [&](auto... arguments) {
    found = LaunchAttentionVariant<decltype(arguments)::value...>;
  });
  return found;
}

Launcher Find(const AttentionParams& p, const AttentionLaunch& launch) {
  switch (launch.kernel) {
    case AttentionKernel::kMmaSm80:
      return FindMmaSm80(p, launch.tile_rows);
    case AttentionKernel::kWgmmaFp8:
    case AttentionKernel::kWgmmaQ16:
      break;  // no kernels of split_kv
  }
  throw std::logic_error("a launch of the plan has a kernel of whole tiles");
}

// The launch over up to kMaxPlanSeqs sequences from `first_seq` on. Takes its floats from
// *workspace.
AttentionTask MakeTask(const AttentionParams& p, const AttentionLaunch& launch, int first_seq,
                       float** workspace) {
  AttentionTask task;
  task.split = launch.split;
  task.first_seq = first_seq;
  task.num_seqs = std::min(p.seqs.batch - first_seq, kMaxPlanSeqs);
  task.group = p.num_heads / p.num_kv_heads;
  task.min_packed_rows = static_cast<int>(launch.min_packed_rows);
  task.max_packed_rows = static_cast<int>(launch.max_packed_rows);
  task.cluster = static_cast<int>(launch.cluster);
  task.cluster_kv_tiles = static_cast<int>(launch.cluster_kv_tiles);
  task.finds_seqs = launch.finds_seqs;
  task.wide = launch.wide;
  task.shares = static_cast<int>(launch.shares);
  const int64_t packed_rows = std::max<int64_t>(p.max_seqlen_q, 1) * task.group;
  task.keys_read_once =
      launch.split && std::min(packed_rows, launch.max_packed_rows) <= launch.tile_rows;
  if (launch.merges_in_kernel && p.num_arrivals >= NumArrivals(launch.shares))
    task.arrivals = p.arrivals;
  task.headers = reinterpret_cast<int*>(*workspace);
  task.partials = *workspace + launch.shares * kPartialHeader;
  *workspace += launch.workspace;
  return task;
}

bool LeavesPartials(const AttentionLaunch& launch) {
  if (launch.invariant_splits > 0) return LeavesInvariantPartials(launch);
  return launch.LeavesPartials();
}

using InvariantLauncher = cudaError_t (*)(const AttentionParams&, const InvariantTask&, int,
                                          cudaStream_t);

InvariantLauncher FindInvariant(const AttentionParams& p, int tile_rows) {
  const bool dynamic = IsDynamic(p.cache.type);
  const std::tuple wanted{Wanted{dynamic ? "dynamic codes" : "cache on a GPU", p.cache.dtype},
                          Wanted{"values", p.cache.value_dtype}, Wanted{"head_dim", p.head_dim},
                          Wanted{"scales of the cache", ScalesOf(p)},
                          Wanted{"tile_rows", tile_rows}};
  InvariantLauncher found = nullptr;
  dispatch(InvariantInstances{}, wanted, [&](auto... arguments) {
    found = LaunchInvariantVariant<decltype(arguments)::value...>;
  });
  return found;
}

InvariantTask MakeInvariantTask(const AttentionParams& p, const AttentionLaunch& launch,
                                const AttentionTask& work) {
  InvariantTask task;
  task.work = work;
  task.ctas = static_cast<int>(launch.grid);
  task.most_splits = static_cast<int>(launch.invariant_splits);
  task.whole_tiles = launch.whole_tiles;
  if (!LeavesInvariantPartials(launch)) task.work.headers = nullptr;
  return task;
}

cudaError_t Run(const AttentionParams& p, const AttentionLaunch& launch, const AttentionTask& task,
                cudaStream_t stream) {
  const int grid = static_cast<int>(launch.grid);
  if (launch.invariant_splits == 0) return Find(p, launch)(p, task, grid, stream);
  return FindInvariant(p, launch.tile_rows)(p, MakeInvariantTask(p, launch, task), grid, stream);
}

cudaError_t RunMerge(const AttentionParams& p, const AttentionLaunch& launch,
                     const AttentionTask& task, cudaStream_t stream) {
  if (launch.invariant_splits == 0) {
    return LaunchMergePartials(p, task, launch.tile_rows, stream);
  }
  return LaunchMergeInvariant(p, MakeInvariantTask(p, launch, task), launch.tile_rows, stream);
}

// The plan's launches over some sequences, but for the one that a prefill kernel does for all of
// them, then the merges of their partial results. `whole` is the call over the sequences that whole
// tiles take. The launches work on different sequences, so each may overlap the one ahead of it;
// the first one overlaps the kernel ahead of them all if `overlaps_previous`. The first merge waits
// for all.
cudaError_t LaunchSeqs(const AttentionParams& p, const AttentionParams& whole,
                       const AttentionPlan& plan, bool without_whole, bool clears_padding,
                       int first_seq, bool overlaps_previous, float* workspace,
                       cudaStream_t stream) {
  AttentionTask tasks[kMaxLaunches];
  bool clear_padding = clears_padding && (p.clear_padding || p.lse != nullptr);
  for (int i = 0; i < plan.num_launches; ++i) {
    const AttentionLaunch& launch = plan.launches[i];
    if (without_whole && !launch.split) continue;
    tasks[i] = MakeTask(p, launch, first_seq, &workspace);
    tasks[i].clear_padding = std::exchange(clear_padding, false);
    tasks[i].overlaps_previous = std::exchange(overlaps_previous, true);
    const cudaError_t status = Run(launch.split ? p : whole, launch, tasks[i], stream);
    if (status != cudaSuccess) return status;
  }
  overlaps_previous = false;
  for (int i = 0; i < plan.num_launches; ++i) {
    const AttentionLaunch& launch = plan.launches[i];
    if (!LeavesPartials(launch) || tasks[i].arrivals != nullptr) continue;
    tasks[i].overlaps_previous = std::exchange(overlaps_previous, true);
    const cudaError_t status = RunMerge(p, launch, tasks[i], stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// Stands for the kernels of mma_sm80, of which two CTAs find room on a multiprocessor.
__global__ void __launch_bounds__(128) ClusterProbeKernel() {}

cudaError_t AskForClusters(const DeviceFacts& facts, int* count) {
  // A CTA has 1 KiB more than it asks for.
  const int bytes = (facts.max_shared_bytes + 1024) / kAttentionCtasPerSm - 1024;
  const cudaError_t status =
      cudaFuncSetAttribute(ClusterProbeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 8;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(8);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(count, ClusterProbeKernel, &config);
}

}  // namespace

cudaError_t CountClusters(int device, const DeviceFacts& facts, int* count) {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices] = {};  // and one more; 0: not asked for yet
  *count = 0;
  if (facts.major < 9 || device < 0 || device >= kMostDevices) return cudaSuccess;
  const int found = known[device].load(std::memory_order_acquire);
  if (found > 0) {
    *count = found - 1;
    return cudaSuccess;
  }
  const cudaError_t status = AskForClusters(facts, count);
  if (status == cudaSuccess) known[device].store(*count + 1, std::memory_order_release);
  return status;
}

cudaError_t LaunchAttention(const AttentionParams& p, const AttentionDecision& decision,
                            const DequantizedKv& kv, cudaStream_t stream) {
  const AttentionPlan& plan = decision.plan;
  if (plan.num_launches == 0) return LaunchClear(p, stream);
  float* workspace = p.workspace + decision.prefill_workspace;
  const bool prefills = decision.Prefills();
  const bool dequantized = decision.dequantize.blocks > 0;
  // Whether whole tiles have other sequences besides those of 16-bit keys and values.
  const bool others = !dequantized || p.paged;
  const AttentionParams whole = dequantized ? OverOthers(p, kv) : p;
  // A prefill kernel goes first: its CTAs take a multiprocessor each, and the smaller ones of the
  // others fill those that it leaves or does not need. Where there are two, the first finds little
  // to do, or nothing.
  cudaError_t status = cudaSuccess;
  if (prefills && others) {
    const int64_t group = p.num_heads / p.num_kv_heads;
    const int min_tokens = static_cast<int>(CeilDiv(plan.Whole()->min_packed_rows, group));
    status = decision.whole == AttentionKernel::kWgmmaFp8
                 ? LaunchWgmmaFp8(whole, min_tokens, stream)
                 : LaunchWgmmaQ16(whole, min_tokens, stream);
  }
  if (status == cudaSuccess && dequantized) {
    status = LaunchWgmmaQ16(OverDequantized(p, kv), kv.plan.min_tokens, stream);
  }
  if (status != cudaSuccess) return status;
  // Else another kernel does that, which knows all sequences.
  const bool clears = (prefills || dequantized) && plan.num_launches == 1;
  if (clears) status = LaunchClearPadding(p, stream);
  const bool without_whole = prefills || !others;
  if (status != cudaSuccess || (clears && without_whole)) return status;
  for (int seq = 0; seq < p.seqs.batch; seq += kMaxPlanSeqs) {
    const bool overlaps_previous = (prefills || dequantized) && seq == 0;
    status = LaunchSeqs(p, whole, plan, without_whole, !clears, seq, overlaps_previous, workspace,
                        stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace fastattn::cuda
