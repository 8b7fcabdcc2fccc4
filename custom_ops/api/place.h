// Which tensors are on a GPU.
#pragma once

#include "paddle/phi/api/all.h"

#if defined(FASTATTN_VIRTUAL_GPU)
extern "C" int virtual_gpu_is_on();  // of tests/virtual_gpu
#endif

namespace fastattn::api {

// Set while a call only checks its arguments (EndOfChecks in check.h). Its tensors have shapes and
// dtypes, but no memory.
inline thread_local bool checking_arguments = false;

// Whether launchers take tensors of a place. The virtual GPU, of which Paddle does not know, takes
// those of the CPU while a test says so.
inline bool IsGpu(const phi::Place& place) {
#if defined(FASTATTN_VIRTUAL_GPU)
  return !checking_arguments && place.GetType() == phi::AllocationType::CPU &&
         virtual_gpu_is_on() != 0;
#else
  return place.GetType() == phi::AllocationType::GPU;
#endif
}

}  // namespace fastattn::api
