#include "cuda/attention/launch.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "common/ceil_div.h"
#include "cuda/attention/mma_sm80/instances.h"
#include "cuda/attention/wgmma_sm90/fp16/launch.h"
#include "cuda/attention/wgmma_sm90/fp8/launch.h"

namespace fastattn::cuda {

namespace {

using Launcher = cudaError_t (*)(const AttentionParams&, const AttentionTask&, int, cudaStream_t);

Launcher Find(const AttentionParams& p, int columns) {
  const bool dynamic = p.paged && IsDynamic(p.cache.type);
  const char* keys = dynamic ? "dynamic codes" : p.paged ? "cache on a GPU" : "keys on a GPU";
  const std::tuple wanted{Wanted{keys, p.paged ? p.cache.dtype : p.ragged.dtype},
                          Wanted{"head_dim", p.head_dim}, Wanted{"paged", p.paged},
                          Wanted{"token_scales", dynamic}, Wanted{"columns", columns}};
  Launcher found = nullptr;
  dispatch(AttentionInstances{}, wanted, [&](auto... arguments) {
    found = LaunchAttentionVariant<decltype(arguments)::value...>;
  });
  return found;
}

// The launch over up to kMaxPlanSeqs rows from `first_row` on. Takes its floats from *workspace.
AttentionTask MakeTask(const AttentionParams& p, const AttentionLaunch& launch, int first_row,
                       float** workspace) {
  AttentionTask task;
  task.split = launch.split;
  task.first_row = first_row;
  task.num_rows = std::min(p.seqs.batch - first_row, kMaxPlanSeqs);
  task.group = p.num_heads / p.num_kv_heads;
  task.min_pairs = static_cast<int>(launch.min_pairs);
  task.max_pairs = static_cast<int>(launch.max_pairs);
  task.cluster = static_cast<int>(launch.cluster);
  const int64_t pairs = std::max<int64_t>(p.max_seqlen_q, 1) * task.group;
  task.once = launch.split && std::min(pairs, launch.max_pairs) <= launch.columns;
  task.headers = reinterpret_cast<int*>(*workspace);
  task.partials = *workspace + launch.grid * kPartialHeader;
  *workspace += launch.workspace;
  return task;
}

bool HasParts(const AttentionLaunch& launch) {
  return launch.split && launch.grid > 1 && launch.cluster == 1;
}

// The plan's launches over some rows, but for the one that a prefill kernel does for all rows, then
// what merges their parts. They work on different rows, so each may run beside the one ahead of it;
// the first one beside the kernel ahead of them all if `beside`. The first merge waits for all.
cudaError_t LaunchRows(const AttentionParams& p, const AttentionPlan& plan, bool without_whole,
                       int first_row, bool beside, float* workspace, cudaStream_t stream) {
  AttentionTask tasks[kMaxLaunches];
  bool clear = p.clear_padding || p.lse != nullptr;
  for (int i = 0; i < plan.num_launches; ++i) {
    const AttentionLaunch& launch = plan.launches[i];
    if (without_whole && !launch.split) continue;
    tasks[i] = MakeTask(p, launch, first_row, &workspace);
    tasks[i].clear = std::exchange(clear, false);
    tasks[i].beside = std::exchange(beside, true);
    const Launcher run = Find(p, launch.columns);
    const cudaError_t status = run(p, tasks[i], static_cast<int>(launch.grid), stream);
    if (status != cudaSuccess) return status;
  }
  beside = false;
  for (int i = 0; i < plan.num_launches; ++i) {
    const AttentionLaunch& launch = plan.launches[i];
    if (!HasParts(launch)) continue;
    tasks[i].beside = std::exchange(beside, true);
    const cudaError_t status =
        LaunchMergeParts(p, tasks[i], launch.columns, static_cast<int>(launch.grid), stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LaunchAttention(const AttentionParams& p, const AttentionDecision& decision,
                            cudaStream_t stream) {
  const AttentionPlan& plan = decision.plan;
  if (plan.num_launches == 0) return LaunchClear(p, stream);
  float* workspace = p.workspace + decision.prefill_workspace;
  const bool prefills = decision.prefill != PrefillKernel::kNone;
  // A prefill kernel goes first: its CTAs take a multiprocessor each, and the smaller ones of the
  // others fill those that it leaves or does not need.
  if (prefills) {
    const int64_t group = p.num_heads / p.num_kv_heads;
    const int min_tokens = static_cast<int>(CeilDiv(plan.Whole()->min_pairs, group));
    const cudaError_t status = decision.prefill == PrefillKernel::kWgmmaFp8
                                   ? LaunchWgmmaFp8(p, min_tokens, stream)
                                   : LaunchWgmmaFp16(p, min_tokens, stream);
    if (status != cudaSuccess) return status;
    if (plan.num_launches == 1) return LaunchClearPadding(p, stream);  // else another one does
  }
  for (int row = 0; row < p.seqs.batch; row += kMaxPlanSeqs) {
    const bool beside = prefills && row == 0;
    const cudaError_t status = LaunchRows(p, plan, prefills, row, beside, workspace, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace fastattn::cuda
