// The rest of the runtime and the driver. Host memory is device memory, streams have nothing to
// wait for, and no stream is captured.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "fat_binary.h"
#include "runtime.h"
#include "tensor_map.h"

using namespace virtual_gpu;

namespace {

std::atomic<bool> on{false};

// Streams and events only have to differ.
template <typename Handle>
cudaError_t MakeHandle(Handle* handle) {
  *handle = reinterpret_cast<Handle>(new char);
  return cudaSuccess;
}

template <typename Handle>
cudaError_t DropHandle(Handle handle) {
  delete reinterpret_cast<char*>(handle);
  return cudaSuccess;
}

cudaError_t Allocate(void** memory, size_t bytes) {
  *memory = bytes == 0 ? nullptr : std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return bytes == 0 || *memory != nullptr ? cudaSuccess : Fail(cudaErrorMemoryAllocation);
}

CUcontext TheContext() {
  static char context;
  return reinterpret_cast<CUcontext>(&context);
}

// As on a real device a thread has no context before somebody sets one.
thread_local CUcontext current = nullptr;

CUresult DeviceGet(CUdevice* device, int ordinal) {
  *device = 0;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult RetainPrimaryContext(CUcontext* context, CUdevice device) {
  *context = TheContext();
  return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult GetCurrentContext(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult SetCurrentContext(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                     const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                     const cuuint32_t* steps, CUtensorMapInterleave interleave,
                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                     CUtensorMapFloatOOBfill fill) {
  if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return static_cast<CUresult>(EncodeTensorMap(map, type, rank, base, size, strides, box, steps,
                                               interleave, swizzle, promotion, fill));
}

template <typename Function>
void* Address(Function* function) {
  return reinterpret_cast<void*>(function);
}

void* DriverFunction(const std::string& name) {
  if (name == "cuDeviceGet") return Address(DeviceGet);
  if (name == "cuDevicePrimaryCtxRetain") return Address(RetainPrimaryContext);
  if (name == "cuCtxGetCurrent") return Address(GetCurrentContext);
  if (name == "cuCtxSetCurrent") return Address(SetCurrentContext);
  if (name == "cuTensorMapEncodeTiled") return Address(EncodeTiled);
  return nullptr;
}

}  // namespace

extern "C" {

// Whether operators run on the virtual GPU: tests say so, custom_ops/api/place.h asks.
void virtual_gpu_turn(int to) { on = to != 0; }
int virtual_gpu_is_on() { return on ? 1 : 0; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return Fail(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return Fail(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = Processors();
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kDefaultShared;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMaxShared;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kMaxShared + 1024;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrClusterLaunch:
      *value = 1;
      break;
    default:
      return Fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return MakeHandle(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return DropHandle(stream); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return MakeHandle(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return DropHandle(event); }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode now = cudaStreamCaptureModeGlobal;
  std::swap(now, *mode);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* argument) {
  function(argument);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return Allocate(memory, bytes); }
cudaError_t cudaMalloc(void** memory, size_t bytes) { return Allocate(memory, bytes); }

cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) { return cudaFreeHost(memory); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = DriverFunction(name);
  const bool found = *function != nullptr;
  if (result != nullptr) {
    *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return Fail(found ? cudaSuccess : cudaErrorSymbolNotFound);
}

}  // extern "C"
