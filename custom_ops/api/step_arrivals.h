// What a layer's step of a backend lends to its attention: counters, which its rope_write_cache_kv
// sets to 0 so that the CTAs of paged_attention merge their partial results without a kernel of its
// own for that, and the workspace that the partial results lie in. An operator that is called alone
// has no counters: nobody could set them to 0 without a kernel more.
#pragma once

#include <cstdint>

#include "api/check.h"
#if defined(FASTATTN_WITH_CUDA)
#include <cuda_runtime.h>
#endif

namespace fastattn::api {

struct StepArrivals {
  int max_seqlen_q = 0;  // what the attention will be told
  int max_seqlen_k = 0;
  Tensor buffer;  // int32: counters, then the workspace; undefined until counters are set to 0
  int64_t num_counters = 0;
  int64_t workspace = 0;  // where that begins
};

// The step that this thread runs, or null. _direct sets it through DirectTable.
StepArrivals*& CurrentStep();

// Takes part in the step of this thread while it lives.
class StepScope {
 public:
  StepScope(StepArrivals*& current, StepArrivals* step) : current_(current) { current_ = step; }
  ~StepScope() { current_ = nullptr; }
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

 private:
  StepArrivals*& current_;
};

#if defined(FASTATTN_WITH_CUDA)

// Gives a step its buffer on the GPU that `like` is on, which is the current one, with so many
// counters.
void LendBuffer(const Tensor& like, cudaStream_t stream, int64_t num_counters, StepArrivals* step);

// So many floats behind the counters, or null where the buffer is too short: the thread's next one
// will be longer.
float* LendWorkspace(int64_t floats, StepArrivals* step);

#endif

}  // namespace fastattn::api
