// What a call from Python into an operator's function is made of: the module's own parts.
#pragma once

#include <array>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "api/direct.h"
#include "paddle/utils/pybind.h"

// Paddle 2.6 does not ship all of this header.
#if __has_include("paddle/phi/core/dense_tensor.inl")
#include "paddle/phi/core/dense_tensor.h"
#endif

namespace fastattn::api {

// An operator as call() wants it: no look-up by name on the way.
struct Handle {
  const DirectOp* op = nullptr;
  std::array<bool, kMostInputs> optional{};
  std::array<bool, kMostInputs> strided{};
  std::array<bool, kMostInputs> written{};
};

inline std::vector<Handle> handles;
inline PyObject* stop_gradient = nullptr;  // interned names of attributes
inline PyObject* own_dict = nullptr;

inline bool WantsGradient(PyObject* object, const Tensor& tensor) {
  if (tensor.get_autograd_meta() == nullptr) return false;
  PyObject* stops = PyObject_GetAttr(object, stop_gradient);
  if (stops == nullptr) PyErr_Clear();
  const bool wants = stops == Py_False;
  Py_XDECREF(stops);
  return wants;
}

// The tensors of a call. They have the data of Python's tensors, but not the objects, which another
// thread may give other data while the call runs without the GIL.
class Inputs {
 public:
  Inputs() { tensors_.reserve(kMostInputs); }

  void Add(const Tensor* tensor) {
    tensors_.push_back(tensor == nullptr ? Tensor() : Tensor(tensor->impl()));
    pointers_[tensors_.size() - 1] = tensor == nullptr ? nullptr : &tensors_.back();
  }

  Tensor* const* data() const { return pointers_; }
  Tensor* operator[](int i) const { return pointers_[i]; }

 private:
  std::vector<Tensor> tensors_;  // never grows beyond what is reserved
  Tensor* pointers_[kMostInputs] = {};
};

// Takes all inputs; false to decline, which checked arguments do less often. wants_gradient tells
// whether one of them does.
inline bool TakeInputs(const Handle& handle, PyObject* const* objects, bool checked, Inputs* inputs,
                       bool* wants_gradient) {
  for (int i = 0; i < handle.op->num_inputs(); ++i) {
    PyObject* object = *objects++;
    if (object == Py_None) {
      if (!handle.optional[i]) return false;
      inputs->Add(nullptr);
      continue;
    }
    if (!paddle::pybind::PyCheckTensor(object)) return false;
    Tensor& tensor = paddle::pybind::CastPyArg2Tensor(object, 0);
    if (!tensor.defined() || !tensor.is_dense_tensor()) return false;
    if (!checked && handle.optional[i] && tensor.numel() == 0) return false;
    if (!handle.strided[i] && !IsContiguous(tensor)) return false;
    if (!checked && !*wants_gradient) *wants_gradient = WantsGradient(object, tensor);
    inputs->Add(&tensor);
  }
  return true;
}

inline bool TakeInteger(PyObject* object, bool wide, DirectAttr* attr) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  attr->integer = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow != 0) return false;
  using Narrow = std::numeric_limits<int>;
  return wide || (attr->integer >= Narrow::min() && attr->integer <= Narrow::max());
}

// `kind` is as in DirectOp::kinds. A text stays the object's.
inline bool TakeAttr(char kind, PyObject* object, DirectAttr* attr) {
  switch (kind) {
    case 'i':
    case 'l':
      return TakeInteger(object, kind == 'l', attr);
    case 'f':
      if (!PyFloat_CheckExact(object)) return false;
      attr->real = PyFloat_AS_DOUBLE(object);
      return true;
    case 'b':
      if (!PyBool_Check(object)) return false;
      attr->integer = object == Py_True;
      return true;
    default: {
      if (!PyUnicode_Check(object)) return false;
      Py_ssize_t size = 0;
      attr->text = PyUnicode_AsUTF8AndSize(object, &size);
      attr->text_size = static_cast<size_t>(size);
      if (attr->text == nullptr) PyErr_Clear();
      return attr->text != nullptr;
    }
  }
}

// A tuple of as many attributes as the operator has.
inline bool TakeAttrs(const Handle& handle, PyObject* tuple, DirectAttr* attrs) {
  const std::string& kinds = handle.op->kinds;
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (!TakeAttr(kinds[i], PyTuple_GET_ITEM(tuple, static_cast<Py_ssize_t>(i)), &attrs[i])) {
      return false;
    }
  }
  return true;
}

// Without the GIL, so that other threads go on while a CPU kernel runs. The message of what was
// thrown comes back, or nothing.
inline std::string RunWithoutGil(const DirectOp& op, const Inputs& inputs, const DirectAttr* attrs,
                                 std::vector<Tensor>* results) {
  std::string message;
  Py_BEGIN_ALLOW_THREADS;
  try {
    op.run(inputs.data(), attrs, results);
  } catch (const std::bad_alloc&) {
    message = "out of memory";
  } catch (const std::exception& error) {
    message = error.what();
    if (message.empty()) message = "unknown error";
  } catch (...) {
    message = "unknown error";
  }
  Py_END_ALLOW_THREADS;
  return message;
}

// The same memory in another shape, for which Paddle's reshape and as_strided take longer:
// `strides` and `first` count elements. Nothing here looks at what a view reaches.
#if __has_include("paddle/phi/core/dense_tensor.inl")
inline Tensor ViewOf(const Tensor& tensor, const Sizes& shape, const Sizes* strides = nullptr,
                     int64_t first = 0) {
  auto view = std::make_shared<phi::DenseTensor>(
      *static_cast<const phi::DenseTensor*>(tensor.impl().get()));
  view->Resize(common::DDim(shape.begin(), static_cast<int>(shape.size())));
  if (strides != nullptr) {
    phi::DenseTensorMeta meta = view->meta();
    meta.strides = common::DDim(strides->begin(), static_cast<int>(strides->size()));
    meta.offset += first * phi::SizeOf(tensor.dtype());
    view->set_meta(meta);
  }
  return Tensor(view);
}
#else
inline Tensor ViewOf(const Tensor& tensor, const Sizes& shape, const Sizes* strides = nullptr,
                     int64_t = 0) {
  if (strides != nullptr) return Tensor();
  return paddle::experimental::view_shape(tensor, shape.ToVector());
}
#endif

// Whether a tensor's elements lie side by side, and there are some.
inline bool HasView(const Tensor& tensor) {
  return tensor.defined() && tensor.is_dense_tensor() && tensor.initialized() &&
         tensor.numel() > 0 && IsContiguous(tensor);
}

// A contiguous tensor [T, ..] as [T, rest]; undefined where that cannot be. May throw.
inline Tensor FlatView(const Tensor& tensor) {
  if (!HasView(tensor) || tensor.dims().size() < 2) return Tensor();
  const int64_t tokens = tensor.dims()[0];
  return ViewOf(tensor, {tokens, tensor.numel() / tokens});
}

// A shape whose first -1 is what its other sizes leave of a tensor's elements. As it is where they
// leave nothing whole.
inline Sizes Resolved(const Sizes& shape, int64_t count) {
  int64_t values[common::DDim::kMaxRank] = {}, others = 1;
  int64_t* open = nullptr;
  for (size_t i = 0; i < shape.size(); ++i) {
    values[i] = shape[i];
    if (shape[i] == -1 && open == nullptr) {
      open = &values[i];
    } else if (shape[i] <= 0 || __builtin_mul_overflow(others, shape[i], &others)) {
      return shape;
    }
  }
  if (open == nullptr || count % others != 0) return shape;
  *open = count / others;
  return Sizes(values, shape.size());
}

// A contiguous tensor in another shape, or, with strides, some of its elements from number `first`
// on; undefined where it has not that many. May throw.
inline Tensor ViewOfSome(const Tensor& tensor, const Sizes& shape, const Sizes* strides,
                         int64_t first) {
  if (!HasView(tensor)) return Tensor();
  int64_t count = 1, last = first;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] <= 0 || __builtin_mul_overflow(count, shape[i], &count)) return Tensor();
    int64_t reach = 0;
    if (strides == nullptr) continue;
    if ((*strides)[i] < 0 || __builtin_mul_overflow(shape[i] - 1, (*strides)[i], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      return Tensor();
    }
  }
  const bool fits = strides == nullptr ? count == tensor.numel() : last < tensor.numel();
  return fits && first >= 0 ? ViewOf(tensor, shape, strides, first) : Tensor();
}

inline void CountWrites(const Handle& handle, const Inputs& inputs) {
  for (int i = 0; i < handle.op->num_inputs(); ++i) {
    if (handle.written[i] && inputs[i] != nullptr) inputs[i]->bump_inplace_version();
  }
}

// Whether `seen` is, by identity, what the dict `own` has under each name (None: nothing), followed
// by the same of each dict in it whose name is in `kinds`, empty ones apart. An attribute of
// paddle.nn.Layer takes Python a microsecond.
inline bool HoldsStill(PyObject* own, PyObject* kinds, PyObject* names, PyObject* seen) {
  Py_ssize_t at = 0;
  const auto same = [&](PyObject* dict) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i, ++at) {
      PyObject* value = PyDict_GetItem(dict, PyTuple_GET_ITEM(names, i));
      if (value == nullptr) value = Py_None;
      if (at >= PyList_GET_SIZE(seen) || PyList_GET_ITEM(seen, at) != value) return false;
    }
    return true;
  };
  if (!same(own)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds); ++i) {
    PyObject* dict = PyDict_GetItem(own, PyTuple_GET_ITEM(kinds, i));
    if (dict == nullptr || !PyDict_Check(dict) || PyDict_Size(dict) == 0) continue;
    if (!same(dict)) return false;
  }
  return at == PyList_GET_SIZE(seen);
}

}  // namespace fastattn::api
