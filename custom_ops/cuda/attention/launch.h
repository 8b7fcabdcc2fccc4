#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"
#include "cuda/common/device_facts.h"
#include "params/attention.h"
#include "params/attention_plan.h"

namespace fastattn::cuda {

// One launch over some rows of a step.
struct AttentionTask {
  bool split = false;
  bool clear = false;   // also give the tokens of no row their values
  bool beside = false;  // runs beside the kernel ahead: see pdl.cuh
  bool once = false;    // no two tiles read the same keys
  int first_row = 0;
  int num_rows = 0;
  int group = 1;  // query heads of a KV head
  int min_pairs = 0;
  int max_pairs = 0;
  int cluster = 1;            // CTAs that take a row and KV head together; 1: equal shares
  int* headers = nullptr;     // [grid, kPartialHeader]
  float* partials = nullptr;  // [grid, kPartialsPerCta, columns, D + 2]
};

// CTAs of a cluster on a device, at most: AttentionSizes::max_cluster.
int MaxAttentionCluster(const DeviceFacts& facts);

// Kernels that LaunchAttention may leave the plan's long rows to.
enum class PrefillKernel : int {
  kNone,
  kFp8,   // wgmma_fp8: e4m3 queries, keys and values
  kHalf,  // wgmma_fp16: 16-bit queries
};

// The one for a device.
PrefillKernel ChoosePrefill(const AttentionParams& p, const DeviceFacts& facts);

// New tokens from which a row is better off there: AttentionSizes::long_seq.
int64_t LongRow(const AttentionParams& p, PrefillKernel prefill);

// Floats of p.workspace that it writes.
int64_t PrefillWorkspace(const AttentionParams& p, PrefillKernel prefill);

// p.workspace holds plan.workspace and PrefillWorkspace(...) floats. A plan without whole tiles has
// no rows for a prefill kernel.
cudaError_t LaunchAttention(const AttentionParams& p, const AttentionPlan& plan,
                            PrefillKernel prefill, cudaStream_t stream);

template <DType kElement, int kHeadDim, bool kPaged, bool kTokenScales, int kColumns>
cudaError_t LaunchAttentionVariant(const AttentionParams& p, const AttentionTask& task, int grid,
                                   cudaStream_t stream);

// Gives all tokens the values of tokens of no row.
cudaError_t LaunchClear(const AttentionParams& p, cudaStream_t stream);

// Gives tokens of no sequence theirs, beside the kernel ahead, which writes the others.
cudaError_t LaunchClearPadding(const AttentionParams& p, cudaStream_t stream);

cudaError_t LaunchMergeParts(const AttentionParams& p, const AttentionTask& task, int columns,
                             int grid, cudaStream_t stream);

}  // namespace fastattn::cuda
