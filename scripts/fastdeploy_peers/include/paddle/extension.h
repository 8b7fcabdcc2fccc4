// A stand-in for the part of Paddle's extension header that FastDeploy's attention operators use.
//
// Tensors do not own memory: they are a pointer and a shape. What an operator allocates comes from
// one workspace that the caller hands in and that is taken from its start at every call.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iomanip>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define HOSTDEVICE __host__ __device__
#define PADDLE_ENFORCE_EQ(a, b, ...) \
  if ((a) != (b)) throw std::runtime_error("not equal: " #a ", " #b)
#define PD_THROW(...) throw std::runtime_error("" #__VA_ARGS__)
#define PD_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error("not so: " #condition)
#define PADDLE_THROW(...) PD_THROW(__VA_ARGS__)
// Registering an operator, to no effect.
#define PD_BUILD_OP(name) static ::standin::Registered registered_##name = ::standin::Registered()
#define PD_KERNEL(f) 0
#define PD_INFER_SHAPE(f) 0
#define PD_INFER_DTYPE(f) 0

namespace standin {

struct Registered {
  using Names = std::vector<std::string>;
  Registered& Inputs(const Names&) { return *this; }
  Registered& Outputs(const Names&) { return *this; }
  Registered& Attrs(const Names&) { return *this; }
  Registered& SetInplaceMap(const std::vector<std::pair<std::string, std::string>>&) {
    return *this;
  }
  Registered& SetKernelFn(int) { return *this; }
  Registered& SetInferShapeFn(int) { return *this; }
  Registered& SetInferDtypeFn(int) { return *this; }
};

// Stream and workspace of the call that runs; one copy for all files of the library.
struct Call {
  cudaStream_t stream = nullptr;
  char* workspace = nullptr;
  size_t bytes = 0, used = 0;
};
inline Call call;

inline void* Take(size_t bytes) {
  const size_t at = call.used;
  call.used += (bytes + 255) / 256 * 256;
  if (call.used > call.bytes) throw std::runtime_error("the workspace is too small");
  return call.workspace + at;
}

}  // namespace standin

namespace phi {
namespace dtype {
// Arithmetic on these is float's: the kernels use the CUDA types where rounding counts.
template <typename Cuda>
struct Narrow {
  Cuda x;
  Narrow() = default;
  HOSTDEVICE Narrow(float value) : x(value) {}
  HOSTDEVICE operator float() const { return static_cast<float>(x); }
};
struct float16 : Narrow<__half> {
  using Narrow::Narrow;
};
struct bfloat16 : Narrow<__nv_bfloat16> {
  using Narrow::Narrow;
};
struct float8_e4m3fn : Narrow<__nv_fp8_e4m3> {
  using Narrow::Narrow;
};
}  // namespace dtype

enum class DataType {
  UNDEFINED,
  INT8,
  UINT8,
  INT32,
  INT64,
  FLOAT16,
  BFLOAT16,
  FLOAT32,
  BOOL,
  FLOAT8_E4M3FN
};

inline size_t SizeOf(DataType type) {
  switch (type) {
    case DataType::INT64:
      return 8;
    case DataType::INT32:
    case DataType::FLOAT32:
      return 4;
    case DataType::FLOAT16:
    case DataType::BFLOAT16:
      return 2;
    default:
      return 1;
  }
}

struct Place {};

struct Allocation {
  void* pointer = nullptr;
  void* ptr() const { return pointer; }
};

struct Allocator {
  using AllocationPtr = std::shared_ptr<Allocation>;
  AllocationPtr Allocate(size_t bytes) {
    return std::make_shared<Allocation>(Allocation{standin::Take(bytes)});
  }
};

namespace errors {
template <typename... A>
std::string Fatal(A&&...) {
  return "";
}
}  // namespace errors

namespace backends::gpu {
inline int GetCurrentDeviceId() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}
inline int GetGPUComputeCapability(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}
inline bool IsCUDAGraphCapturing() {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(standin::call.stream, &status);
  return status != cudaStreamCaptureStatusNone;
}
}  // namespace backends::gpu
}  // namespace phi

namespace common {
struct DDim : std::vector<int64_t> {
  using std::vector<int64_t>::vector;
};
}  // namespace common

namespace paddle {

using DataType = phi::DataType;
using Place = phi::Place;
using float16 = phi::dtype::float16;
using bfloat16 = phi::dtype::bfloat16;
using float8_e4m3fn = phi::dtype::float8_e4m3fn;

class Tensor {
 public:
  Tensor() = default;
  Tensor(void* pointer, DataType type, common::DDim dims)
      : pointer_(pointer), type_(type), dims_(std::move(dims)) {}

  template <typename T>
  const T* data() const {
    return static_cast<const T*>(pointer_);
  }
  template <typename T>
  T* data() {
    return static_cast<T*>(pointer_);
  }
  const common::DDim& dims() const { return dims_; }
  const common::DDim& shape() const { return dims_; }
  DataType dtype() const { return type_; }
  Place place() const { return {}; }
  cudaStream_t stream() const { return standin::call.stream; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t dim : dims_) count *= dim;
    return count;
  }
  void copy_(const Tensor& from, const Place&, bool blocking) {
    const size_t bytes = from.numel() * phi::SizeOf(from.type_);
    cudaMemcpyAsync(pointer_, from.pointer_, bytes, cudaMemcpyDefault, stream());
    if (blocking) cudaStreamSynchronize(stream());
  }

 private:
  void* pointer_ = nullptr;
  DataType type_ = DataType::UNDEFINED;
  common::DDim dims_;
};

template <typename T>
class optional {
 public:
  optional() = default;
  optional(const T& value) : value_(value), set_(true) {}
  explicit operator bool() const { return set_; }
  const T& get() const {
    if (!set_) throw std::runtime_error("an optional tensor is missing");
    return value_;
  }

 private:
  T value_;
  bool set_ = false;
};

inline std::string Optional(const std::string& name) { return name; }

inline phi::Allocator* GetAllocator(const Place&) {
  static phi::Allocator allocator;
  return &allocator;
}

inline Tensor empty(const common::DDim& dims, DataType type, const Place& = {}) {
  Tensor shaped(nullptr, type, dims);
  return Tensor(standin::Take(shaped.numel() * phi::SizeOf(type)), type, dims);
}

inline Tensor zeros(const common::DDim& dims, DataType type, const Place& place = {}) {
  Tensor made = empty(dims, type, place);
  cudaMemsetAsync(made.data<char>(), 0, made.numel() * phi::SizeOf(type), standin::call.stream);
  return made;
}

}  // namespace paddle

inline paddle::Tensor GetEmptyTensor(const common::DDim& dims, const paddle::DataType& type,
                                     const paddle::Place& place) {
  return paddle::empty(dims, type, place);
}
