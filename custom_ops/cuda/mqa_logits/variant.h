// A variant of the Hopper kernel: its arguments and its launcher.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/mqa_logits/rows.cuh"

namespace fastattn::cuda::mqa_logits {

struct Arguments {
  CUtensorMap query;       // FP8: rows are heads
  CUtensorMap key;         // rows of keys, of a page where paged; not of pages of MXFP4
  CUtensorMap key_scales;  // ragged: one row of bytes
  LogitsParams p;
  LogitsGroups groups;
  int most_keys = 0;  // of a sequence that there can be; paged only
};

// kColumns (query, head) pairs meet the keys at once: kColumns / kHeads queries.
template <IndexerQuant kQuant, bool kPaged, int kHeads, int kColumns>
cudaError_t LaunchLogitsVariant(const Arguments& arguments, cudaStream_t stream);

}  // namespace fastattn::cuda::mqa_logits
