// What takes libcudart's place: kernels are registered and launched, everything else of the runtime
// that host code of this package calls is in host_calls.cc. A launch is over when it returns.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

#include "fat_binary.h"
#include "runtime.h"

namespace virtual_gpu {

namespace {

// Kernels are registered before main, maybe before objects of this file exist, and launched until
// the process ends: nothing here is freed.
struct Registry {
  std::mutex mutex;  // of the maps, and of launches: one runs at a time
  std::map<const void*, Kernel*> by_host;
  std::set<const void*> kernels;
};

Registry& TheRegistry() {
  static auto& registry = *new Registry();
  return registry;
}

struct Failure {
  cudaError_t last = cudaSuccess;
  std::string text;  // of the last kernel that failed
};

Failure& ThreadFailure() {
  thread_local Failure failure;
  return failure;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::vector<Configuration>& Configurations() {
  thread_local std::vector<Configuration> configurations;
  return configurations;
}

// A host function or a handle of __cudaGetKernel. The registry is locked.
Kernel* Find(const void* function) {
  Registry& registry = TheRegistry();
  if (registry.kernels.count(function) != 0) {
    return const_cast<Kernel*>(static_cast<const Kernel*>(function));
  }
  const auto found = registry.by_host.find(function);
  return found == registry.by_host.end() ? nullptr : found->second;
}

Dim3 ToDim3(const dim3& d) { return {d.x, d.y, d.z}; }

// What a device would refuse before anything runs.
cudaError_t Check(const Kernel& kernel, const Launch& launch) {
  const Dim3 &grid = launch.grid, &block = launch.block, &cluster = launch.cluster;
  const bool empty = grid.count() == 0 || block.count() == 0 || cluster.count() == 0;
  if (empty || block.count() > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      grid.x > 0x7FFFFFFFu || grid.y > 0xFFFF || grid.z > 0xFFFF) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0 ||
      cluster.count() > 8) {
    return cudaErrorInvalidClusterSize;
  }
  if (kernel.max_threads != 0 && block.count() > kernel.max_threads) return cudaErrorInvalidValue;
  if (launch.dynamic_shared > kernel.max_dynamic_shared ||
      launch.dynamic_shared + kernel.static_shared > kMaxShared) {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

bool Traced() {
  static const bool traced = std::getenv("VIRTUAL_GPU_TRACE") != nullptr;
  return traced;
}

void Trace(const Kernel& kernel, const Launch& launch, double seconds) {
  int status = 0;
  char* name = abi::__cxa_demangle(kernel.name.c_str(), nullptr, nullptr, &status);
  std::fprintf(
      stderr, "virtual GPU: %8.3f s, grid %u %u %u, block %u, cluster %u, shared %lld, %s\n",
      seconds, launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x, launch.cluster.x,
      static_cast<long long>(launch.dynamic_shared), name == nullptr ? kernel.name.c_str() : name);
  std::free(name);
}

cudaError_t RunKernel(Kernel* kernel, Launch* launch, void** arguments) {
  kernel->Prepare();
  launch->module = &kernel->binary->module();
  launch->function = kernel->function;
  if (kernel->cluster.count() != 0 && launch->cluster.count() == 1) {
    launch->cluster = kernel->cluster;
  }
  const cudaError_t status = Check(*kernel, *launch);
  if (status != cudaSuccess) return status;
  const Function& function = *kernel->function;
  launch->params.resize(static_cast<size_t>(function.param_bytes));
  for (size_t i = 0; i < function.params.size(); ++i) {
    const Variable& param = function.params[i];
    std::memcpy(launch->params.data() + param.offset, arguments[i],
                static_cast<size_t>(param.bytes));
  }
  const auto begin = std::chrono::steady_clock::now();
  Run(*launch);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  if (Traced()) Trace(*kernel, *launch, took.count());
  return cudaSuccess;
}

cudaError_t LaunchKernel(const void* function, Launch* launch, void** arguments) {
  const std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  Kernel* kernel = Find(function);
  if (kernel == nullptr) return Fail(cudaErrorInvalidDeviceFunction);
  try {
    return Fail(RunKernel(kernel, launch, arguments));
  } catch (const std::exception& error) {
    const std::string what = error.what();  // of Run it begins with the kernel's name
    const bool named = what.compare(0, kernel->name.size(), kernel->name) == 0;
    ThreadFailure().text = named ? what : kernel->name + ": " + what;
    std::fprintf(stderr, "virtual GPU: %s\n", ThreadFailure().text.c_str());
    return Fail(cudaErrorLaunchFailure);
  }
}

// Reads what of a launch's attributes changes its result. PDL does not: launches do not overlap.
Launch ToLaunch(const cudaLaunchConfig_t& config) {
  Launch launch;
  launch.grid = ToDim3(config.gridDim);
  launch.block = ToDim3(config.blockDim);
  launch.dynamic_shared = static_cast<int64_t>(config.dynamicSmemBytes);
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      launch.cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y,
                        attribute.val.clusterDim.z};
    }
  }
  return launch;
}

}  // namespace

cudaError_t Fail(cudaError_t status) {
  if (status != cudaSuccess) ThreadFailure().last = status;
  return status;
}

int Processors() {
  static const int processors = [] {
    const char* text = std::getenv("VIRTUAL_GPU_PROCESSORS");
    const int number = text == nullptr ? 4 : std::atoi(text);
    return number < 1 ? 1 : number > 132 ? 132 : number;
  }();
  return processors;
}

}  // namespace virtual_gpu

using namespace virtual_gpu;

extern "C" {

// Of crt/host_runtime.h, which only nvcc's own code may include.
void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(new FatBinary(wrapper));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.mutex);
  auto* kernel = new Kernel();
  kernel->binary = reinterpret_cast<FatBinary*>(binary);
  kernel->name = name;
  // Several files may have an instance of a template; one of the copies serves all of them.
  if (registry.by_host.emplace(host, kernel).second) registry.kernels.insert(kernel);
}

cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* host) {
  const std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  *handle = reinterpret_cast<cudaKernel_t>(Find(host));
  return Fail(*handle == nullptr ? cudaErrorInvalidDeviceFunction : cudaSuccess);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  Configurations().push_back({grid, block, shared, static_cast<cudaStream_t>(stream)});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (Configurations().empty()) return Fail(cudaErrorMissingConfiguration);
  const Configuration& last = Configurations().back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  Configurations().pop_back();
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  Launch launch;
  launch.grid = ToDim3(grid);
  launch.block = ToDim3(block);
  launch.dynamic_shared = static_cast<int64_t>(shared);
  return LaunchKernel(function, &launch, arguments);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  Launch launch = ToLaunch(*config);
  return LaunchKernel(function, &launch, arguments);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  Kernel* kernel = Find(function);
  if (kernel == nullptr) return Fail(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kMaxShared) return Fail(cudaErrorInvalidValue);
  kernel->max_dynamic_shared = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  Kernel* kernel = Find(function);
  if (kernel == nullptr) return Fail(cudaErrorInvalidDeviceFunction);
  try {
    kernel->Prepare();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "virtual GPU: %s: %s\n", kernel->name.c_str(), error.what());
    return Fail(cudaErrorInvalidPtx);
  }
  *attributes = {};
  attributes->sharedSizeBytes = static_cast<size_t>(kernel->static_shared);
  attributes->localSizeBytes = static_cast<size_t>(kernel->binary->module().local_bytes);
  attributes->maxThreadsPerBlock =
      kernel->max_threads == 0 ? 1024 : static_cast<int>(kernel->max_threads);
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = kernel->max_dynamic_shared;
  return cudaSuccess;
}

// As many as find a multiprocessor for each CTA, but at least one: kernels that want a cluster of 8
// run on a small virtual GPU, too.
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                           const cudaLaunchConfig_t* config) {
  const auto ctas = static_cast<int>(ToLaunch(*config).cluster.count());
  *count = ctas > Processors() ? 1 : Processors() / ctas;
  return cudaSuccess;
}

// Of launchers that the build left out.
int virtual_gpu_missing(const char* launcher) {
  if (Traced()) std::fprintf(stderr, "virtual GPU: not built: %s\n", launcher);
  return static_cast<int>(cudaErrorStubLibrary);
}

cudaError_t cudaGetLastError() {
  const cudaError_t last = ThreadFailure().last;
  ThreadFailure().last = cudaSuccess;
  return last;
}

cudaError_t cudaPeekAtLastError() { return ThreadFailure().last; }

const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorStubLibrary:
      return "a kernel that was not built";
    case cudaErrorLaunchFailure:
      return ThreadFailure().text.c_str();
    default:
      break;
  }
  thread_local std::string text;
  text = "error " + std::to_string(static_cast<int>(status));
  return text.c_str();
}

}  // extern "C"
