#include "cuda/host_calls/launch.h"

#include <atomic>
#include <map>
#include <mutex>

namespace fastattn::cuda {

namespace {

// Where a device's host calls run beside the stream that they belong to. Nothing of it is freed:
// calls may be under way as long as the process lives.
struct Beside {
  cudaStream_t stream = nullptr;
  cudaEvent_t before = nullptr;  // what comes before the call has ended
  cudaEvent_t after = nullptr;   // the call has
  cudaStream_t owner = nullptr;  // the stream that the last call belongs to
  bool owed = false;             // it still has to wait for that call
};

std::mutex& Mutex() {
  static std::mutex mutex;
  return mutex;
}

std::atomic<int> pending{0};  // of all devices

cudaError_t Make(Beside* beside) {
  // Nor may these be made between others' captures: see AllocateHost.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t status = cudaThreadExchangeStreamCaptureMode(&mode);
  if (status != cudaSuccess) return status;
  status = cudaEventCreateWithFlags(&beside->before, cudaEventDisableTiming);
  if (status == cudaSuccess) {
    status = cudaEventCreateWithFlags(&beside->after, cudaEventDisableTiming);
  }
  if (status == cudaSuccess) {
    status = cudaStreamCreateWithFlags(&beside->stream, cudaStreamNonBlocking);
  }
  const cudaError_t restored = cudaThreadExchangeStreamCaptureMode(&mode);
  return status != cudaSuccess ? status : restored;
}

// The current device's. The mutex is held.
cudaError_t BesideOfDevice(Beside** found) {
  static auto& devices = *new std::map<int, Beside>();
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  *found = &devices[device];
  return (*found)->stream == nullptr ? Make(*found) : cudaSuccess;
}

// Whether a graph captures the stream, or nobody can tell: the default stream may not be asked
// while another one is captured.
bool IsCaptured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

cudaError_t Join(Beside* beside) {
  if (!beside->owed || IsCaptured(beside->owner)) return cudaSuccess;
  beside->owed = false;
  pending.fetch_sub(1, std::memory_order_release);
  return cudaStreamWaitEvent(beside->owner, beside->after, 0);
}

}  // namespace

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

cudaError_t LaunchHostCallBeside(void (*function)(void*), void* argument, cudaStream_t stream) {
  if (IsCaptured(stream)) return LaunchHostCall(function, argument, stream);
  const std::lock_guard<std::mutex> lock(Mutex());
  Beside* beside = nullptr;
  cudaError_t status = BesideOfDevice(&beside);
  if (status == cudaSuccess) status = Join(beside);
  if (status == cudaSuccess) status = cudaEventRecord(beside->before, stream);
  if (status == cudaSuccess) status = cudaStreamWaitEvent(beside->stream, beside->before, 0);
  if (status == cudaSuccess) status = cudaLaunchHostFunc(beside->stream, function, argument);
  if (status == cudaSuccess) status = cudaEventRecord(beside->after, beside->stream);
  if (status != cudaSuccess) return status;
  if (!beside->owed) pending.fetch_add(1, std::memory_order_release);
  beside->owner = stream;
  beside->owed = true;
  return cudaSuccess;
}

cudaError_t JoinHostCalls(cudaStream_t stream) {
  if (pending.load(std::memory_order_acquire) == 0) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(Mutex());
  Beside* beside = nullptr;
  const cudaError_t status = BesideOfDevice(&beside);
  if (status != cudaSuccess) return status;
  return beside->owner == stream ? Join(beside) : cudaSuccess;
}

}  // namespace fastattn::cuda
