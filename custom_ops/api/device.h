// Running a launcher on the GPU that an operator's tensors are on.
#pragma once

#if defined(FASTATTN_WITH_CUDA)

#include <cuda_runtime.h>

#include "api/check.h"
#include "cuda/common/device_facts.h"

namespace fastattn::api {

inline bool OnGpu(const Tensor& tensor) { return IsGpu(tensor.place()); }

// Paddle's stream of a tensor's GPU.
inline cudaStream_t StreamOf(const Tensor& tensor) {
#if defined(FASTATTN_VIRTUAL_GPU)
  static_cast<void>(tensor);
  return nullptr;
#else
  return tensor.stream();
#endif
}

// Throws for a failure, and clears it: the runtime would report it to whoever asks next.
inline void CheckCuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) {
    cudaGetLastError();
    PD_THROW(std::string("[RuntimeError] ") + op + ": CUDA error: " + cudaGetErrorString(status));
  }
}

// Makes a tensor's GPU the current one for a launch. The calling thread may be set to another, or,
// before its first use of a GPU, have none.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) : scope_(device) { CheckCuda(op, scope_.status()); }

 private:
  cuda::ContextScope scope_;
};

// Calls launch(stream), which returns a cudaError_t, on the tensor's GPU and Paddle's stream of it.
template <typename F>
void LaunchOnGpu(const char* op, const Tensor& tensor, F&& launch) {
  DeviceGuard guard(op, tensor.place().GetDeviceId());
  Guarded(op, [&] { CheckCuda(op, launch(StreamOf(tensor))); });
}

}  // namespace fastattn::api

#endif  // FASTATTN_WITH_CUDA
