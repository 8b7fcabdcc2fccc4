#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"
#include "heuristics/attention.h"
#include "params/attention.h"

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

// p.workspace holds decision.workspace floats.
cudaError_t LaunchAttention(const AttentionParams& p, const AttentionDecision& decision,
                            cudaStream_t stream);

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
