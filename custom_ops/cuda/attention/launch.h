// Attention on a GPU: which kernel families take a call, and their launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/device_facts.h"
#include "params/attention.h"
#include "params/attention_plan.h"

namespace fastattn::cuda {

// CTAs of a cluster on a device, at most: AttentionSizes::max_cluster.
int MaxAttentionCluster(const DeviceFacts& facts);

// Kernels that LaunchAttention may leave the plan's long sequences to.
enum class PrefillKernel : int {
  kNone,
  kFp8,   // wgmma_sm90/fp8: e4m3 queries, FP8 keys and values
  kFp16,  // wgmma_sm90/fp16: 16-bit queries
};

// The one for a device.
PrefillKernel ChoosePrefill(const AttentionParams& p, const DeviceFacts& facts);

// New tokens from which a sequence is better off there: AttentionSizes::long_seq.
int64_t LongSeqTokens(const AttentionParams& p, PrefillKernel prefill);

// Floats of p.workspace that it writes.
int64_t PrefillWorkspace(const AttentionParams& p, PrefillKernel prefill);

// p.workspace holds plan.workspace and PrefillWorkspace(...) floats. A plan without whole tiles has
// no sequences for a prefill kernel.
cudaError_t LaunchAttention(const AttentionParams& p, const AttentionPlan& plan,
                            PrefillKernel prefill, cudaStream_t stream);

}  // namespace fastattn::cuda
