// Checks of operator arguments. Every message names the operator, the argument, what was expected
// and what came, and starts with the Python exception that it means: "[ValueError] merge: ...".
//
// Paddle turns a throw into an OSError; fastattn/_ops.py turns that into the exception named. These
// checks also stand between a direct caller of the raw operator and the process's memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "api/place.h"
#include "api/sizes.h"
#include "common/strided_view.h"
#include "common/types.h"
#include "paddle/common/ddim.h"
#include "paddle/phi/api/all.h"

namespace fastattn::api {

using paddle::Tensor;
using OptionalTensor = paddle::optional<Tensor>;
using Shape = std::vector<int64_t>;

// `kind` is the Python exception: "TypeError" (a wrong type or dtype), "ValueError" (a wrong shape,
// place or value) or "NotImplementedError" (right, but not supported).
template <typename... Parts>
[[noreturn]] void Fail(const char* kind, const char* op, const char* arg, const Parts&... parts) {
  std::ostringstream text;
  text << '[' << kind << "] " << op << ": " << arg << ": ";
  (text << ... << parts);
  PD_THROW(text.str());
}

inline std::string ShapeText(const Sizes& shape) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < shape.size(); ++i) {
    text << (i ? ", " : "");
    if (shape[i] < 0) {
      text << '?';
    } else {
      text << shape[i];
    }
  }
  text << ']';
  return text.str();
}

// Product of sizes, for an allocation or an index. The last may be an element's bytes.
inline int64_t CheckedProduct(const char* op, const char* arg,
                              std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  bool fits = true;
  for (int64_t size : sizes) {
    if (size == 0) return 0;
    fits = !__builtin_mul_overflow(product, size, &product) && fits;
  }
  if (!fits) {
    std::ostringstream text;
    for (const int64_t& size : sizes) text << (&size == sizes.begin() ? "" : " * ") << size;
    Fail("ValueError", op, arg, "expected sizes whose product fits 64 bits, got ", text.str());
  }
  return product;
}

// The same for the dimensions of a shape from `first` on.
inline int64_t CheckedProduct(const char* op, const char* arg, const Sizes& shape,
                              size_t first = 0) {
  int64_t product = 1;
  for (size_t i = first; i < shape.size(); ++i) {
    product = CheckedProduct(op, arg, {product, shape[i]});
  }
  return product;
}

// Refuses a tensor whose size in bytes, in any dtype that results may have, does not fit 64 bits: a
// view that repeats its elements can be that large. Returns whether it has elements.
inline bool RequireBytesFit(const char* op, const char* name, const Tensor& tensor) {
  const auto& dims = tensor.dims();
  int64_t bytes = 16;
  bool fits = true;
  for (int i = 0; i < dims.size(); ++i) {
    if (dims[i] == 0) return false;
    fits = dims[i] > 0 && !__builtin_mul_overflow(bytes, int64_t{dims[i]}, &bytes) && fits;
  }
  if (!fits) {
    Fail("ValueError", op, name, "expected sizes whose product fits 64 bits, got shape ",
         ShapeText(SizesOf(tensor)));
  }
  return true;
}

// Widest load or store of a CUDA kernel.
inline constexpr int64_t kVectorBytes = 16;

// Refuses a GPU tensor that does not start at a multiple of `bytes`, as the widest access of a
// kernel to it needs. A CPU takes any address.
inline void RequireAlignedAddress(const char* op, const char* name, const Tensor& tensor,
                                  int64_t bytes) {
  if (bytes < 2 || !IsGpu(tensor.place()) || tensor.numel() == 0) return;
  const auto rest = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data()) % bytes);
  if (rest != 0) {
    Fail("ValueError", op, name, "expected an address of a multiple of ", bytes,
         " bytes on a GPU, got one ", rest, " bytes past a multiple");
  }
}

// The same for every address that the strides lead to, those of the last `inner` dimensions left
// out, whose elements lie side by side.
inline void RequireAligned(const char* op, const char* name, const Tensor& tensor, int64_t bytes,
                           size_t inner = 1) {
  if (tensor.numel() == 0 || !IsGpu(tensor.place())) return;
  RequireAlignedAddress(op, name, tensor, bytes);
  const Sizes shape = SizesOf(tensor), strides = StridesOf(tensor);
  const auto size = static_cast<int64_t>(phi::SizeOf(tensor.dtype()));
  for (size_t i = 0; i + inner < shape.size(); ++i) {
    if (shape[i] > 1 && strides[i] * size % bytes != 0) {
      Fail("ValueError", op, name, "expected strides of a multiple of ", bytes / size,
           " elements (", bytes, " bytes) on a GPU, got strides ", ShapeText(strides));
    }
  }
}

// Whether a tensor's elements lie side by side in their order; strides of an empty one mean
// nothing.
inline bool IsContiguous(const Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const auto& sizes = tensor.dims();
  const auto& strides = tensor.strides();
  int64_t expected = 1;
  for (int i = sizes.size(); i-- > 0;) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

// Argument of one operator, for checks in a chain:
//   Arg("merge", "prefix_lse", lse).Defined().On(place).Dtype({DType::kFloat32}).Dims({h, t});
class Arg {
 public:
  Arg(const char* op, const char* name, const Tensor& tensor)
      : op_(op), name_(name), tensor_(tensor) {
    // An empty tensor has no allocation, so initialized() is false for it; defined() is the test.
    if (!tensor.defined()) Fail("TypeError", op, name, "expected a tensor, got None");
    if (!RequireBytesFit(op, name, tensor)) return;
    if (!tensor.initialized()) Fail("ValueError", op, name, "the tensor holds no data");
    RequireAlignedAddress(op, name, tensor, static_cast<int64_t>(phi::SizeOf(tensor.dtype())));
  }

  const Arg& On(const phi::Place& place) const {
    // An empty tensor may have no place.
    if (tensor_.numel() > 0 && tensor_.place() != place) {
      Fail("ValueError", op_, name_, "expected a tensor on ", place, ", got one on ",
           tensor_.place());
    }
    return *this;
  }

  const Arg& Dtype(std::initializer_list<phi::DataType> allowed) const {
    for (auto dtype : allowed) {
      if (tensor_.dtype() == dtype) return *this;
    }
    std::ostringstream text;
    for (auto dtype : allowed) text << (dtype == *allowed.begin() ? "" : " or ") << dtype;
    Fail("TypeError", op_, name_, "expected dtype ", text.str(), ", got ", tensor_.dtype());
  }

  const Arg& Rank(int rank) const {
    if (tensor_.dims().size() != rank) {
      Fail("ValueError", op_, name_, "expected ", rank, " dimensions, got shape ",
           ShapeText(SizesOf(tensor_)));
    }
    return *this;
  }

  // Exact shape; -1 accepts any size of that dimension.
  const Arg& Dims(const Sizes& expected) const {
    const Sizes shape = SizesOf(tensor_);
    bool same = shape.size() == expected.size();
    for (size_t i = 0; same && i < shape.size(); ++i) {
      same = expected[i] < 0 || shape[i] == expected[i];
    }
    if (!same) {
      Fail("ValueError", op_, name_, "expected shape ", ShapeText(expected), ", got ",
           ShapeText(shape));
    }
    return *this;
  }

  const Arg& Contiguous() const {
    if (!IsContiguous(tensor_)) {
      Fail("ValueError", op_, name_, "expected a contiguous tensor, got shape ",
           ShapeText(SizesOf(tensor_)), " with strides ", ShapeText(StridesOf(tensor_)));
    }
    return *this;
  }

  // Elements of the last dimension lie side by side; other strides are free.
  const Arg& LastDimContiguous() const {
    const Sizes shape = SizesOf(tensor_);
    // Strides of an empty tensor mean nothing.
    const bool several = tensor_.numel() > 0 && !shape.empty() && shape.back() > 1;
    if (several && StridesOf(tensor_).back() != 1) {
      Fail("ValueError", op_, name_, "expected stride 1 in the last dimension, got strides ",
           ShapeText(StridesOf(tensor_)));
    }
    return *this;
  }

 private:
  const char* op_;
  const char* name_;
  const Tensor& tensor_;
};

// The tensor of an optional argument, or null. Paddle passes None as an absent or as an undefined
// tensor, depending on the version.
inline const Tensor* Get(const OptionalTensor& tensor) {
  return tensor && tensor.get().defined() ? &tensor.get() : nullptr;
}

namespace detail {

// Paddle 2.6 has no FP8 dtypes; there, only uint8 tensors hold codes.
template <typename T, typename = void>
struct Fp8Dtypes {
  static bool Is(T, DType) { return false; }
};

template <typename T>
struct Fp8Dtypes<T, std::void_t<decltype(T::FLOAT8_E4M3FN)>> {
  static bool Is(T dtype, DType wanted) {
    return dtype == (wanted == DType::kE4M3 ? T::FLOAT8_E4M3FN : T::FLOAT8_E5M2);
  }
};

}  // namespace detail

// Element type of a tensor. An 8-bit cache may be a uint8 tensor whatever its codes are: callers
// that know the cache type map kUInt8 themselves.
inline DType ToDType(const char* op, const char* name, phi::DataType dtype) {
  switch (dtype) {
    case phi::DataType::FLOAT32:
      return DType::kFloat32;
    case phi::DataType::FLOAT16:
      return DType::kFloat16;
    case phi::DataType::BFLOAT16:
      return DType::kBFloat16;
    case phi::DataType::UINT8:
      return DType::kUInt8;
    case phi::DataType::INT8:
      return DType::kInt8;
    default:
      if (detail::Fp8Dtypes<phi::DataType>::Is(dtype, DType::kE4M3)) return DType::kE4M3;
      if (detail::Fp8Dtypes<phi::DataType>::Is(dtype, DType::kE5M2)) return DType::kE5M2;
      Fail("TypeError", op, name, "dtype ", dtype, " is not supported");
  }
}

// Dtype of a new tensor; codes are uint8.
inline phi::DataType ToPhi(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return phi::DataType::FLOAT32;
    case DType::kFloat16:
      return phi::DataType::FLOAT16;
    case DType::kBFloat16:
      return phi::DataType::BFLOAT16;
    default:
      return phi::DataType::UINT8;
  }
}

// Start of a tensor's data as T, or null for an empty one.
template <typename T = void>
T* MutableData(Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.data());
}

// Address of a tensor that is written in place although Paddle hands it over as const: the handle
// is const, the data are not. For arguments of the in-place map and for Params shared with readers.
inline void* MutableAddress(const Tensor& tensor) {
  if (tensor.numel() == 0) return nullptr;
  Tensor handle = tensor;  // shares the data
  return handle.data();
}

template <typename T = void>
const T* Data(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<const T*>(tensor.data());
}

// The bytes of a tensor that has elements.
inline StridedView BytesOf(const Tensor& tensor) {
  const common::DDim& shape = tensor.dims();
  const common::DDim& strides = tensor.strides();
  const auto bytes = static_cast<int64_t>(phi::SizeOf(tensor.dtype()));
  StridedView view(reinterpret_cast<uintptr_t>(tensor.data()), bytes);
  for (int i = 0; i < shape.size(); ++i) view.Add(shape[i], strides[i] * bytes);
  return view;
}

[[noreturn]] inline void FailShared(const char* op, const char* written, const char* other) {
  Fail("ValueError", op, written, "it is written and must not share memory with ", other);
}

// Refuses a written tensor that shares memory with another argument. Interleaved views, such as K
// and V of one pool, share none if their elements do not.
inline void RequireApart(const char* op, const char* written_name, const Tensor& written,
                         const char* other_name, const Tensor& other) {
  if (written.numel() == 0 || other.numel() == 0) return;
  if (MayOverlap(BytesOf(written), BytesOf(other))) FailShared(op, written_name, other_name);
}

struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null: not given
};

inline void RequireApart(const char* op, const char* written_name, const Tensor& written,
                         std::initializer_list<NamedTensor> others) {
  for (const auto& [name, tensor] : others) {
    if (tensor != nullptr) RequireApart(op, written_name, written, name, *tensor);
  }
}

// Refuses a written tensor that shares memory with another argument, unless both are the same view:
// for operators that read an element before they write over it. Views of one pool with the same
// strides may interleave.
inline void RequireSameOrApart(const char* op, const char* written_name, const Tensor& written,
                               const char* other_name, const Tensor& other) {
  if (written.numel() == 0 || other.numel() == 0) return;
  const bool same = written.data() == other.data() && SizesOf(written) == SizesOf(other) &&
                    StridesOf(written) == StridesOf(other) &&
                    phi::SizeOf(written.dtype()) == phi::SizeOf(other.dtype());
  if (!same && MayOverlap(BytesOf(written), BytesOf(other))) {
    Fail("ValueError", op, written_name, "it is written and must be ", other_name,
         " itself or not share memory with it");
  }
}

// Refuses a written tensor of which two elements may share memory.
inline void RequireNoOverlap(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.numel() > 0 && BytesOf(tensor).RepeatsItself()) {
    Fail("ValueError", op, name, "it is written and no two of its elements may share memory, got ",
         "shape ", ShapeText(SizesOf(tensor)), " with strides ", ShapeText(StridesOf(tensor)));
  }
}

// Ends a call that only checks its arguments. It is no std::exception, so that no handler of errors
// takes it for one.
struct ArgumentsAreRight {};

// Every operator comes here after the checks of its arguments, and before it reads or writes a
// tensor.
inline void EndOfChecks() {
  if (checking_arguments) throw ArgumentsAreRight{};
}

// Ends the checks of an operator that runs on the CPU.
inline void RequireCpu(const char* op, const phi::Place& place) {
  EndOfChecks();
  if (place.GetType() != phi::AllocationType::CPU || IsGpu(place)) {
    PD_THROW(std::string("[NotImplementedError] ") + op + ": no CUDA kernel in this build");
  }
}

// Runs f and turns an exception of a dispatch into this operator's error.
template <typename F>
void Guarded(const char* op, F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    PD_THROW(std::string("[NotImplementedError] ") + op + ": " + error.what());
  }
}

}  // namespace fastattn::api
