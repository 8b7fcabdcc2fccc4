// Facts of a device that are asked for once, and functions of the CUDA driver: host code.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace fastattn::cuda {

// Properties that do not change while a process runs.
struct DeviceFacts {
  int major = 0;             // of the compute capability
  int processors = 0;        // multiprocessors
  int max_shared_bytes = 0;  // of a CTA, with the attribute that raises the default
};

// Facts of a device. The first use by any thread asks the runtime for them.
cudaError_t GetDeviceFacts(int device, DeviceFacts* facts);

// Returns the current device and its facts.
cudaError_t GetCurrentDevice(int* device, DeviceFacts* facts);

// Functions of the driver. They are looked up by name, so that nothing links against its library.
struct Driver {
  using DeviceOf = CUresult (*)(CUdevice*, int);
  using ContextOf = CUresult (*)(CUcontext*, CUdevice);
  using GetContext = CUresult (*)(CUcontext*);
  using SetContext = CUresult (*)(CUcontext);
  using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                   const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                   const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                   CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

  DeviceOf get_device = nullptr;
  ContextOf retain_primary_context = nullptr;
  GetContext get_current_context = nullptr;
  SetContext set_current_context = nullptr;
  EncodeTiled encode_tiled = nullptr;  // null before CUDA 12
};

// A look-up that failed is made again at the next call.
cudaError_t GetDriver(const Driver** driver);

// CUresult and cudaError_t have the same numbers.
inline cudaError_t ToRuntime(CUresult result) { return static_cast<cudaError_t>(result); }

// Makes a device's primary context, which the runtime and Paddle use, the current one of the
// calling thread while it lives. A thread may have none, or that of another device: launches would
// choose a device by themselves, functions of the driver fail.
class ContextScope {
 public:
  explicit ContextScope(int device);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

  cudaError_t status() const { return status_; }

 private:
  cudaError_t status_ = cudaSuccess;
  const Driver* driver_ = nullptr;
  CUcontext previous_ = nullptr;
  bool changed_ = false;
};

// Runs something once on each device, such as setting a kernel's attributes. A launcher holds it as
// a static object. Two threads that come at once may both run it.
class OncePerDevice {
 public:
  template <typename F>
  cudaError_t Run(int device, F&& f) {
    const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
    if ((done_.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
    const cudaError_t status = f();
    if (status == cudaSuccess) done_.fetch_or(bit, std::memory_order_release);
    return status;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

}  // namespace fastattn::cuda
