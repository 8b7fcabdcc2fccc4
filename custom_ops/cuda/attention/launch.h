#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"
#include "params/attention.h"
#include "params/attention_plan.h"

namespace fastattn::cuda {

// One launch over some rows of a step.
struct AttentionTask {
  bool split = false;
  bool clear = false;  // also give the tokens of no row their values
  int first_row = 0;
  int num_rows = 0;
  int group = 1;  // query heads of a KV head
  int min_columns = 0;
  int max_columns = 0;
  int* headers = nullptr;     // [grid, kPartialHeader]
  float* partials = nullptr;  // [grid, kPartsPerCta, columns, D + 2]
};

// Whether LaunchAttention may leave the plan's long rows to the FP8 kernel of prefill_sm90.
bool TakesFp8Prefill(const AttentionParams& p, const AttentionPlan& plan);

// p.workspace holds PlanAttention(...).workspace floats, and PrefillSm90Workspace(p) floats with
// `fp8_prefill`.
cudaError_t LaunchAttention(const AttentionParams& p, const AttentionPlan& plan, bool fp8_prefill,
                            cudaStream_t stream);

template <DType kElement, int kHeadDim, bool kPaged, bool kTokenScales, int kColumns>
cudaError_t LaunchAttentionVariant(const AttentionParams& p, const AttentionTask& task, int grid,
                                   cudaStream_t stream);

// Gives all tokens the values of tokens of no row.
cudaError_t LaunchClear(const AttentionParams& p, cudaStream_t stream);

cudaError_t LaunchMergeParts(const AttentionParams& p, const AttentionTask& task, int columns,
                             int grid, cudaStream_t stream);

}  // namespace fastattn::cuda
