#include "cuda/attention/launch.h"

#include <algorithm>

#include "common/dispatch.h"
#include "cuda/prefill_half_sm90/launch.h"
#include "cuda/prefill_sm90/launch.h"

namespace fastattn::cuda {

namespace {

using Launcher = cudaError_t (*)(const AttentionParams&, const AttentionTask&, int, cudaStream_t);

template <DType kElement, int kHeadDim, bool kPaged, bool kTokenScales>
Launcher FindColumns(int columns) {
  Launcher found = nullptr;
  dispatch<8, 16, 64>(columns, "columns", [&](auto c) {
    found = LaunchAttentionVariant<kElement, kHeadDim, kPaged, kTokenScales, decltype(c)::value>;
  });
  return found;
}

template <int kHeadDim>
Launcher FindElement(const AttentionParams& p, int columns) {
  Launcher found = nullptr;
  if (!p.paged) {
    dispatch<DType::kBFloat16, DType::kFloat16, DType::kE4M3, DType::kE5M2, DType::kInt8>(
        p.packed.dtype, "keys on a GPU", [&](auto element) {
          found = FindColumns<decltype(element)::value, kHeadDim, false, false>(columns);
        });
  } else if (IsDynamic(p.cache.type)) {
    dispatch<DType::kE4M3, DType::kInt8>(p.cache.dtype, "dynamic codes", [&](auto element) {
      found = FindColumns<decltype(element)::value, kHeadDim, true, true>(columns);
    });
  } else {
    dispatch<DType::kBFloat16, DType::kFloat16, DType::kE4M3, DType::kE5M2, DType::kInt8>(
        p.cache.dtype, "cache on a GPU", [&](auto element) {
          found = FindColumns<decltype(element)::value, kHeadDim, true, false>(columns);
        });
  }
  return found;
}

Launcher Find(const AttentionParams& p, int columns) {
  Launcher found = nullptr;
  dispatch<64, 128>(p.head_dim, "head_dim", [&](auto head_dim) {
    found = FindElement<decltype(head_dim)::value>(p, columns);
  });
  return found;
}

cudaError_t RunLaunch(const AttentionParams& p, const AttentionLaunch& launch, bool clear,
                      cudaStream_t stream) {
  const Launcher run = Find(p, launch.columns);
  const int grid = static_cast<int>(launch.grid);
  for (int row = 0; row < p.rows.batch; row += kMaxPlanRows) {
    AttentionTask task;
    task.split = launch.split;
    task.clear = clear;
    task.first_row = row;
    task.num_rows = std::min(p.rows.batch - row, kMaxPlanRows);
    task.group = p.num_heads / p.num_kv_heads;
    task.min_columns = static_cast<int>(launch.min_columns);
    task.max_columns = static_cast<int>(launch.max_columns);
    task.cluster = static_cast<int>(launch.cluster);
    task.headers = reinterpret_cast<int*>(p.workspace);
    task.partials = p.workspace + launch.grid * kPartialHeader;
    cudaError_t status = run(p, task, grid, stream);
    if (status == cudaSuccess && launch.split && grid > 1 && launch.cluster == 1) {
      status = LaunchMergeParts(p, task, launch.columns, grid, stream);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

int MaxAttentionCluster() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return 1;
  }
  return major >= 9 ? 8 : 1;  // 8 is what every such device can do
}

PrefillKernel ChoosePrefill(const AttentionParams& p, const AttentionPlan& plan) {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return PrefillKernel::kNone;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
    return PrefillKernel::kNone;
  }
  if (major != 9 || plan.num_launches != 2) return PrefillKernel::kNone;
  if (PrefillSm90Supports(p)) return PrefillKernel::kFp8;
  // Its tiles are 128 tokens of one head: shorter rows are better off where heads share a tile.
  const bool half = p.max_seqlen_q >= 64 && PrefillHalfSm90Supports(p);
  return half ? PrefillKernel::kHalf : PrefillKernel::kNone;
}

int64_t PrefillWorkspace(const AttentionParams& p, PrefillKernel prefill) {
  return prefill == PrefillKernel::kFp8 ? PrefillSm90Workspace(p) : 0;
}

cudaError_t LaunchAttention(const AttentionParams& p, const AttentionPlan& plan,
                            PrefillKernel prefill, cudaStream_t stream) {
  if (plan.num_launches == 0) return LaunchClear(p, stream);
  for (int i = 0; i < plan.num_launches; ++i) {
    const AttentionLaunch& launch = plan.launches[i];
    cudaError_t status;
    if (prefill != PrefillKernel::kNone && !launch.split) {
      const int64_t group = p.num_heads / p.num_kv_heads;
      const int min_tokens = static_cast<int>((launch.min_columns + group - 1) / group);
      status = prefill == PrefillKernel::kFp8 ? LaunchPrefillSm90(p, min_tokens, stream)
                                              : LaunchPrefillHalfSm90(p, min_tokens, stream);
    } else {
      status = RunLaunch(p, launch, i == 0 && (p.clear_padding || p.lse != nullptr), stream);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace fastattn::cuda
