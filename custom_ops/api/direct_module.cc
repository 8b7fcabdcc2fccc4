// fastattn._direct: an operator's function, called from Python with eager tensors as they are.
//
// call() declines whatever is out of the ordinary (returns None), and fastattn/_ops.py then finds
// out what it is: a wrong argument, a tensor to be copied first, a tensor that wants a gradient.
#include <dlfcn.h>

#include <array>
#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api/direct.h"
#include "paddle/utils/pybind.h"

// Paddle 2.6 does not ship all of this header.
#if __has_include("paddle/phi/core/dense_tensor.inl")
#include "paddle/phi/core/dense_tensor.h"
#endif

namespace fastattn::api {

namespace {

constexpr int kMostInputs = 24;
constexpr int kMostAttrs = 16;

// An operator as call() wants it: no look-up by name on the way.
struct Handle {
  const DirectOp* op;
  std::array<bool, kMostInputs> optional{};
  std::array<bool, kMostInputs> strided{};
  std::array<bool, kMostInputs> written{};
};

std::vector<Handle> handles;
PyObject* stop_gradient = nullptr;  // the attribute's interned name

bool IsContiguous(const Tensor& tensor) {
  const auto& sizes = tensor.dims();
  const auto& strides = tensor.strides();
  int64_t expected = 1;
  for (int i = sizes.size(); i-- > 0;) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

bool WantsGradient(PyObject* object, const Tensor& tensor) {
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

// Fills the inputs; false to decline, which checked arguments do less often. wants_gradient tells
// whether one of them does.
bool TakeInputs(const Handle& handle, PyObject* tuple, bool checked, Inputs* inputs,
                bool* wants_gradient) {
  for (int i = 0; i < handle.op->num_inputs; ++i) {
    PyObject* object = PyTuple_GET_ITEM(tuple, i);
    if (object == Py_None) {
      if (!handle.optional[i]) return false;
      inputs->Add(nullptr);
      continue;
    }
    if (!paddle::pybind::PyCheckTensor(object)) return false;
    Tensor& tensor = paddle::pybind::CastPyArg2Tensor(object, 0);
    if (!tensor.defined() || !tensor.is_dense_tensor()) return false;
    if (!checked && handle.optional[i] && tensor.numel() == 0) return false;
    if (!handle.strided[i] && tensor.numel() > 0 && !IsContiguous(tensor)) return false;
    if (!checked && !*wants_gradient) *wants_gradient = WantsGradient(object, tensor);
    inputs->Add(&tensor);
  }
  return true;
}

bool TakeInteger(PyObject* object, bool wide, DirectAttr* attr) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  attr->integer = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow != 0) return false;
  using Narrow = std::numeric_limits<int>;
  return wide || (attr->integer >= Narrow::min() && attr->integer <= Narrow::max());
}

bool TakeAttrs(const Handle& handle, PyObject* tuple, DirectAttr* attrs) {
  const std::string& kinds = handle.op->kinds;
  for (size_t i = 0; i < kinds.size(); ++i) {
    PyObject* object = PyTuple_GET_ITEM(tuple, i);
    DirectAttr& attr = attrs[i];
    switch (kinds[i]) {
      case 'i':
      case 'l':
        if (!TakeInteger(object, kinds[i] == 'l', &attr)) return false;
        break;
      case 'f':
        if (!PyFloat_CheckExact(object)) return false;
        attr.real = PyFloat_AS_DOUBLE(object);
        break;
      case 'b':
        if (!PyBool_Check(object)) return false;
        attr.integer = object == Py_True;
        break;
      default: {
        if (!PyUnicode_Check(object)) return false;
        Py_ssize_t size = 0;
        attr.text = PyUnicode_AsUTF8AndSize(object, &size);
        if (attr.text == nullptr) {
          PyErr_Clear();
          return false;
        }
        attr.text_size = static_cast<size_t>(size);
      }
    }
  }
  return true;
}

// All registered outputs: those written in place are the inputs themselves (None where absent).
PyObject* MakeOutputs(const DirectOp& op, PyObject* inputs, const std::vector<Tensor>& results) {
  const auto count = static_cast<Py_ssize_t>(op.output_inputs.size());
  PyObject* list = PyList_New(count);
  if (list == nullptr) return nullptr;
  size_t next = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = Py_None;
    if (op.output_inputs[i] >= 0) {
      item = PyTuple_GET_ITEM(inputs, op.output_inputs[i]);
      Py_INCREF(item);
    } else if (next < results.size() && results[next].defined()) {
      item = paddle::pybind::ToPyObject(results[next++]);
    } else {
      ++next;
      Py_INCREF(item);
    }
    PyList_SET_ITEM(list, i, item);
  }
  return list;
}

// Without the GIL, so that other threads go on while a CPU kernel runs. The message of what was
// thrown comes back, or nothing.
std::string RunWithoutGil(const DirectOp& op, const Inputs& inputs, const DirectAttr* attrs,
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

PyObject* CallChecked(PyObject* const* args, Py_ssize_t count);

// Lets no C++ exception into the interpreter.
PyObject* Call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return CallChecked(args, count);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// call(handle, inputs, attrs, gradients_count): gradients_count() says whether a tensor that wants
// a gradient is a reason to decline. None: the arguments have been checked, nothing of it is.
PyObject* CallChecked(PyObject* const* args, Py_ssize_t count) {
  const Py_ssize_t index = count == 4 ? PyLong_AsSsize_t(args[0]) : -1;
  if (index < 0 || index >= static_cast<Py_ssize_t>(handles.size()) || !PyTuple_Check(args[1]) ||
      !PyTuple_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "call(handle, inputs, attrs, gradients_count)");
    return nullptr;
  }
  const Handle& handle = handles[index];
  const DirectOp& op = *handle.op;
  if (PyTuple_GET_SIZE(args[1]) != op.num_inputs ||
      PyTuple_GET_SIZE(args[2]) != static_cast<Py_ssize_t>(op.kinds.size())) {
    PyErr_Format(PyExc_TypeError, "%s: expected %d inputs and %zu attributes", op.name,
                 op.num_inputs, op.kinds.size());
    return nullptr;
  }
  Inputs inputs;
  DirectAttr attrs[kMostAttrs];
  bool wants_gradient = false;
  const bool checked = args[3] == Py_None;
  if (!TakeInputs(handle, args[1], checked, &inputs, &wants_gradient) ||
      !TakeAttrs(handle, args[2], attrs)) {
    Py_RETURN_NONE;
  }
  if (wants_gradient) {
    PyObject* counts = PyObject_CallNoArgs(args[3]);
    if (counts == nullptr) return nullptr;
    const bool decline = counts == Py_True;
    Py_DECREF(counts);
    if (decline) Py_RETURN_NONE;
  }
  std::vector<Tensor> results;
  const std::string message = RunWithoutGil(op, inputs, attrs, &results);
  if (!message.empty()) {
    PyErr_SetString(PyExc_RuntimeError, message.c_str());
    return nullptr;
  }
  for (int i = 0; i < op.num_inputs; ++i) {
    if (handle.written[i] && inputs[i] != nullptr) inputs[i]->bump_inplace_version();
  }
  return MakeOutputs(op, args[1], results);
}

// Facts about an operator: (handle, inputs, optional, attrs, outputs, {output: input}, strided).
py::tuple Facts(size_t index) {
  const Handle& handle = handles[index];
  const DirectOp& op = *handle.op;
  py::dict inplace;
  for (size_t i = 0; i < op.output_inputs.size(); ++i) {
    if (op.output_inputs[i] >= 0) inplace[py::int_(i)] = py::int_(op.output_inputs[i]);
  }
  const auto mask = [&op](const std::array<bool, kMostInputs>& flags) {
    py::tuple result(op.num_inputs);
    for (int i = 0; i < op.num_inputs; ++i) result[i] = py::bool_(flags[i]);
    return result;
  };
  return py::make_tuple(index, py::tuple(py::cast(op.inputs)), mask(handle.optional),
                        py::tuple(py::cast(op.attrs)), py::tuple(py::cast(op.outputs)), inplace,
                        mask(handle.strided));
}

Handle MakeHandle(const DirectOp& op) {
  if (op.inputs.size() != static_cast<size_t>(op.num_inputs) || op.num_inputs > kMostInputs ||
      op.kinds.size() > static_cast<size_t>(kMostAttrs) || op.attrs.size() != op.kinds.size()) {
    throw std::runtime_error(std::string(op.name) + " was built unlike its function");
  }
  Handle handle{&op};
  for (int i = 0; i < op.num_inputs; ++i) {
    handle.optional[i] = op.optional[i];
    for (const char* name : op.strided) handle.strided[i] |= op.inputs[i] == name;
  }
  for (int input : op.output_inputs) {
    if (input >= 0) handle.written[input] = handle.strided[input] = true;  // never a copy
  }
  return handle;
}

py::dict AllFacts() {
  py::dict facts;
  for (size_t i = 0; i < handles.size(); ++i) facts[handles[i].op->name] = Facts(i);
  return facts;
}

// Facts of every operator of the library at `path`, by its name.
py::dict Bind(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  using GetTable = const DirectTable* (*)();
  const auto get = reinterpret_cast<GetTable>(dlsym(library, kDirectTableSymbol));
  if (get == nullptr) throw std::runtime_error(path + " has no table of operators");
  const DirectTable* table = get();
  if (table->version != kDirectVersion || table->tensor_size != sizeof(Tensor)) {
    throw std::runtime_error(path + " is of another build than fastattn._direct");
  }
  // Calls may be under way with the handles of a table that is bound already.
  if (!handles.empty() && handles.front().op == table->ops->data()) return AllFacts();
  std::vector<Handle> found;
  for (const DirectOp& op : *table->ops) found.push_back(MakeHandle(op));
  handles = std::move(found);
  return AllFacts();
}

// A tensor [T, ..] as [T, rest] over the same memory, which takes reshape longer. None: declined.
PyObject* Flat(PyObject*, PyObject* object) {
  if (!paddle::pybind::PyCheckTensor(object)) Py_RETURN_NONE;
  try {
    const Tensor& tensor = paddle::pybind::CastPyArg2Tensor(object, 0);
    if (!tensor.defined() || !tensor.is_dense_tensor() || !tensor.initialized()) Py_RETURN_NONE;
    if (tensor.dims().size() < 2 || tensor.numel() == 0 || !IsContiguous(tensor)) Py_RETURN_NONE;
    const int64_t tokens = tensor.dims()[0], rest = tensor.numel() / tokens;
#if __has_include("paddle/phi/core/dense_tensor.inl")
    auto flat = std::make_shared<phi::DenseTensor>(
        *static_cast<const phi::DenseTensor*>(tensor.impl().get()));
    flat->Resize(common::make_ddim({tokens, rest}));
    return paddle::pybind::ToPyObject(Tensor(flat));
#else
    return paddle::pybind::ToPyObject(paddle::experimental::view_shape(tensor, {tokens, rest}));
#endif
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
}

// unchanged(own, kinds, names, seen): whether `seen` holds, by identity, what the dict `own` has
// under each name (None: nothing), followed by the same of each dict in it whose name is in
// `kinds`, empty ones apart. `seen` may go on. An attribute of paddle.nn.Layer takes Python a
// microsecond.
PyObject* Unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyDict_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]) ||
      !PyList_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError, "unchanged(own, kinds, names, seen)");
    return nullptr;
  }
  PyObject* names = args[2];
  PyObject* seen = args[3];
  Py_ssize_t at = 0;
  const auto same = [&](PyObject* dict) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i, ++at) {
      PyObject* value = PyDict_GetItem(dict, PyTuple_GET_ITEM(names, i));
      if (value == nullptr) value = Py_None;
      if (at >= PyList_GET_SIZE(seen) || PyList_GET_ITEM(seen, at) != value) return false;
    }
    return true;
  };
  if (!same(args[0])) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) {
    PyObject* dict = PyDict_GetItem(args[0], PyTuple_GET_ITEM(args[1], i));
    if (dict == nullptr || !PyDict_Check(dict) || PyDict_Size(dict) == 0) continue;
    if (!same(dict)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

template <typename Function>
PyCFunction Method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"call", Method(Call), METH_FASTCALL,
     "call(handle, inputs, attrs, gradients_count) -> list of outputs, or None: declined."},
    {"flat", Flat, METH_O, "flat(tensor [T, ..]) -> [T, rest] over the same memory, or None."},
    {"unchanged", Method(Unchanged), METH_FASTCALL,
     "unchanged(own, kinds, names, seen) -> whether the dict's values are those seen before."},
};

}  // namespace

}  // namespace fastattn::api

PYBIND11_MODULE(_direct, m) {
  using namespace fastattn::api;
  m.doc() = "Operators, called around Paddle's registry.";
  stop_gradient = PyUnicode_InternFromString("stop_gradient");
  m.def("bind", &Bind, "Loads a library of operators; returns facts of each by its name.");
  for (PyMethodDef& method : methods) {
    m.add_object(method.ml_name,
                 py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
  }
}
