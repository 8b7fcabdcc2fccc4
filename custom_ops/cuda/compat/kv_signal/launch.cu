#include "cuda/compat/kv_signal/launch.h"

namespace fastattn::cuda {

cudaError_t AllocateHost(size_t bytes, void** memory) {
  // An allocation may not be made between others' captures, unless this thread says that it knows.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t status = cudaThreadExchangeStreamCaptureMode(&mode);
  if (status != cudaSuccess) return status;
  status = cudaHostAlloc(memory, bytes, cudaHostAllocPortable);
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  return status != cudaSuccess ? status : restored;
}

cudaError_t LaunchCopyToHost(const void* device, void* host, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  return cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream);
}

cudaError_t LaunchHostCall(void (*function)(void*), void* argument, cudaStream_t stream) {
  return cudaLaunchHostFunc(stream, function, argument);
}

}  // namespace fastattn::cuda
