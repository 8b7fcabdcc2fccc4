// Checks of an operator's arguments without their data: what a program knows while it is traced.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "api/direct_call.h"

namespace fastattn::api {

using CheckFunction = void (*)(const DirectOp& op, Tensor* const* inputs, const DirectAttr* attrs);

inline CheckFunction check_arguments = nullptr;  // of the library

using DtypeNames = std::map<std::string, phi::DataType>;

// Paddle 2.6 has no FP8 dtypes.
template <typename T, typename = void>
struct Fp8Names {
  static void AddTo(DtypeNames*) {}
};

template <typename T>
struct Fp8Names<T, std::void_t<decltype(T::FLOAT8_E4M3FN)>> {
  static void AddTo(DtypeNames* names) {
    names->insert({{"float8_e4m3fn", T::FLOAT8_E4M3FN}, {"float8_e5m2", T::FLOAT8_E5M2}});
  }
};

inline phi::DataType DtypeOf(const std::string& name) {
  using D = phi::DataType;
  static const DtypeNames names = [] {
    DtypeNames all = {
        {"bool", D::BOOL},         {"int8", D::INT8},           {"uint8", D::UINT8},
        {"int16", D::INT16},       {"int32", D::INT32},         {"int64", D::INT64},
        {"bfloat16", D::BFLOAT16}, {"float16", D::FLOAT16},     {"float32", D::FLOAT32},
        {"float64", D::FLOAT64},   {"complex64", D::COMPLEX64}, {"complex128", D::COMPLEX128}};
    Fp8Names<D>::AddTo(&all);
    return all;
  }();
  const auto found = names.find(name);
  if (found == names.end()) throw py::key_error("no dtype " + name);
  return found->second;
}

// A CPU tensor of a shape and dtype. Nothing reads or writes its elements.
#if __has_include("paddle/phi/core/dense_tensor.inl")
// `address` is where its memory would start; it moves on, so that no two tensors share memory.
inline Tensor TensorWithoutData(phi::DataType dtype, const std::vector<int64_t>& shape,
                                uintptr_t* address) {
  constexpr int64_t kMost = int64_t{1} << 50, kPage = 4096;
  auto bytes = static_cast<int64_t>(phi::SizeOf(dtype));
  for (int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) bytes = kMost;
  }
  bytes = std::clamp<int64_t>(bytes, kPage, kMost);
  const auto memory = std::make_shared<phi::Allocation>(
      reinterpret_cast<void*>(*address), static_cast<size_t>(bytes), phi::CPUPlace());
  *address += static_cast<uintptr_t>((bytes / kPage + 2) * kPage);
  const phi::DenseTensorMeta meta(dtype, common::make_ddim(shape));
  return Tensor(std::make_shared<phi::DenseTensor>(memory, meta));
}
#else
inline Tensor TensorWithoutData(phi::DataType dtype, const std::vector<int64_t>& shape,
                                uintptr_t*) {
  return paddle::empty(shape, dtype, phi::CPUPlace());
}
#endif

// check(handle, inputs, attrs): each input is None or (name of its dtype, shape). Raises a
// RuntimeError for what the operator refuses.
inline void Check(size_t index, const py::tuple& inputs, const py::tuple& attrs) {
  if (index >= handles.size()) throw py::index_error("no operator of this number");
  const Handle& handle = handles[index];
  if (inputs.size() != static_cast<size_t>(handle.op->num_inputs())) {
    throw py::value_error(handle.op->name + ": wrong number of inputs");
  }
  DirectAttr values[kMostAttrs];
  if (attrs.size() != handle.op->kinds.size() || !TakeAttrs(handle, attrs.ptr(), values)) {
    throw py::type_error(handle.op->name + ": wrong types of attributes");
  }
  uintptr_t address = uintptr_t{1} << 40;
  Inputs tensors;
  for (const py::handle& input : inputs) {
    if (input.is_none()) {
      tensors.Add(nullptr);
      continue;
    }
    const auto fact = py::cast<py::tuple>(input);
    const phi::DataType dtype = DtypeOf(py::cast<std::string>(fact[0]));
    const auto shape = py::cast<std::vector<int64_t>>(fact[1]);
    const Tensor tensor = TensorWithoutData(dtype, shape, &address);
    tensors.Add(&tensor);
  }
  check_arguments(*handle.op, tensors.data(), values);
}

}  // namespace fastattn::api
