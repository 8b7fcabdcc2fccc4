#include "cuda/common/device_facts.h"

#include <mutex>

namespace fastattn::cuda {

namespace {

constexpr int kMostDevices = 64;

template <typename Function>
cudaError_t LookUp(const char* name, int version, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result);
#else
  static_cast<void>(version);
  const cudaError_t status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (status != cudaSuccess) return status;
  if (result != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorSymbolNotFound;
  *function = reinterpret_cast<Function>(found);
  return cudaSuccess;
}

cudaError_t LookUpAll(Driver* driver) {
  cudaError_t status = LookUp("cuDeviceGet", 2000, &driver->get_device);
  if (status == cudaSuccess) {
    status = LookUp("cuDevicePrimaryCtxRetain", 7000, &driver->retain_primary_context);
  }
  if (status == cudaSuccess) {
    status = LookUp("cuCtxGetCurrent", 4000, &driver->get_current_context);
  }
  if (status == cudaSuccess) {
    status = LookUp("cuCtxSetCurrent", 4000, &driver->set_current_context);
  }
  if (status != cudaSuccess) return status;
  if (LookUp("cuTensorMapEncodeTiled", 12000, &driver->encode_tiled) != cudaSuccess) {
    driver->encode_tiled = nullptr;
    cudaGetLastError();
  }
  return cudaSuccess;
}

// The primary context of a device, retained for as long as the process runs.
cudaError_t PrimaryContext(const Driver& driver, int device, CUcontext* context) {
  static std::atomic<CUcontext> contexts[kMostDevices] = {};
  if (device < 0 || device >= kMostDevices) return cudaErrorInvalidDevice;
  *context = contexts[device].load(std::memory_order_acquire);
  if (*context != nullptr) return cudaSuccess;
  CUdevice handle = 0;
  cudaError_t status = ToRuntime(driver.get_device(&handle, device));
  if (status == cudaSuccess) status = ToRuntime(driver.retain_primary_context(context, handle));
  if (status == cudaSuccess) contexts[device].store(*context, std::memory_order_release);
  return status;
}

cudaError_t Ask(int device, DeviceFacts* facts) {
  cudaError_t status =
      cudaDeviceGetAttribute(&facts->major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&facts->processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&facts->max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                device);
}

}  // namespace

cudaError_t GetDeviceFacts(int device, DeviceFacts* facts) {
  static std::mutex mutex;
  static DeviceFacts known[kMostDevices];
  static std::atomic<bool> asked[kMostDevices] = {};
  if (device < 0 || device >= kMostDevices) return Ask(device, facts);
  if (!asked[device].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!asked[device].load(std::memory_order_relaxed)) {
      const cudaError_t status = Ask(device, &known[device]);
      if (status != cudaSuccess) return status;
      asked[device].store(true, std::memory_order_release);
    }
  }
  *facts = known[device];
  return cudaSuccess;
}

cudaError_t GetCurrentDevice(int* device, DeviceFacts* facts) {
  const cudaError_t status = cudaGetDevice(device);
  return status == cudaSuccess ? GetDeviceFacts(*device, facts) : status;
}

cudaError_t GetDriver(const Driver** driver) {
  static std::mutex mutex;
  static Driver found;
  static std::atomic<bool> ready{false};
  if (!ready.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!ready.load(std::memory_order_relaxed)) {
      const cudaError_t status = LookUpAll(&found);
      if (status != cudaSuccess) return status;
      ready.store(true, std::memory_order_release);
    }
  }
  *driver = &found;
  return cudaSuccess;
}

ContextScope::ContextScope(int device) {
  status_ = GetDriver(&driver_);
  if (status_ != cudaSuccess) return;
  CUcontext wanted = nullptr;
  status_ = PrimaryContext(*driver_, device, &wanted);
  if (status_ != cudaSuccess) return;
  status_ = ToRuntime(driver_->get_current_context(&previous_));
  if (status_ != cudaSuccess || previous_ == wanted) return;
  status_ = ToRuntime(driver_->set_current_context(wanted));
  changed_ = status_ == cudaSuccess;
}

ContextScope::~ContextScope() {
  if (changed_) driver_->set_current_context(previous_);
}

}  // namespace fastattn::cuda
