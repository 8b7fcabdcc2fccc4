// Running a launcher on the GPU that an operator's tensors are on.
#pragma once

#if defined(FASTATTN_WITH_CUDA)

#include <cuda_runtime.h>

#include "api/check.h"

namespace fastattn::api {

inline bool OnGpu(const Tensor& tensor) {
  return tensor.place().GetType() == phi::AllocationType::GPU;
}

inline void CheckCuda(const char* op, cudaError_t status) {
  if (status != cudaSuccess) {
    PD_THROW(std::string("[RuntimeError] ") + op + ": CUDA error: " + cudaGetErrorString(status));
  }
}

// Makes a tensor's GPU the current one for a launch; a server may call from a thread that is set to
// another.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) : op_(op) {
    CheckCuda(op_, cudaGetDevice(&previous_));
    changed_ = device != previous_;
    if (changed_) CheckCuda(op_, cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const char* op_;
  int previous_ = 0;
  bool changed_ = false;
};

// Calls launch(stream), which returns a cudaError_t, on the tensor's GPU and Paddle's stream of it.
template <typename F>
void LaunchOnGpu(const char* op, const Tensor& tensor, F&& launch) {
  DeviceGuard guard(op, tensor.place().GetDeviceId());
  Guarded(op, [&] { CheckCuda(op, launch(tensor.stream())); });
}

}  // namespace fastattn::api

#endif  // FASTATTN_WITH_CUDA
