// fastattn._direct: an operator's function, called from Python with eager tensors as they are.
//
// call() declines whatever is out of the ordinary (returns None), and fastattn/_ops.py then finds
// out what it is: a wrong argument, a tensor to be copied first, a tensor that wants a gradient.
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api/direct_bound.h"
#include "api/direct_call.h"
#include "api/direct_check.h"
#include "api/process.h"

namespace fastattn::api {

namespace {

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

PyObject* CallChecked(PyObject* const* args, Py_ssize_t count);

// call() of the module. No C++ exception may reach the interpreter.
PyObject* Call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return CallChecked(args, count);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// call(handle, inputs, attrs, gradients_count): gradients_count() says whether a tensor that wants
// a gradient is a reason to decline. None means that the arguments have been checked already.
PyObject* CallChecked(PyObject* const* args, Py_ssize_t count) {
  const Py_ssize_t index = count == 4 ? PyLong_AsSsize_t(args[0]) : -1;
  if (index < 0 || index >= static_cast<Py_ssize_t>(handles.size()) || !PyTuple_Check(args[1]) ||
      !PyTuple_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError, "call(handle, inputs, attrs, gradients_count)");
    return nullptr;
  }
  const Handle& handle = handles[index];
  const DirectOp& op = *handle.op;
  if (PyTuple_GET_SIZE(args[1]) != op.num_inputs() ||
      PyTuple_GET_SIZE(args[2]) != static_cast<Py_ssize_t>(op.kinds.size())) {
    PyErr_Format(PyExc_TypeError, "%s: expected %d inputs and %zu attributes", op.name.c_str(),
                 op.num_inputs(), op.kinds.size());
    return nullptr;
  }
  Inputs inputs;
  DirectAttr attrs[kMostAttrs];
  bool wants_gradient = false;
  const bool checked = args[3] == Py_None;
  if (!TakeInputs(handle, &PyTuple_GET_ITEM(args[1], 0), checked, &inputs, &wants_gradient) ||
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
  CountWrites(handle, inputs);
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
    py::tuple result(op.num_inputs());
    for (int i = 0; i < op.num_inputs(); ++i) result[i] = py::bool_(flags[i]);
    return result;
  };
  return py::make_tuple(index, py::tuple(py::cast(op.inputs)), mask(handle.optional),
                        py::tuple(py::cast(op.attrs)), py::tuple(py::cast(op.outputs)), inplace,
                        mask(handle.strided));
}

Handle MakeHandle(const DirectOp& op) {
  Handle handle;
  handle.op = &op;
  for (int i = 0; i < op.num_inputs(); ++i) {
    handle.optional[i] = op.optional[i];
    handle.strided[i] = op.strided[i];
  }
  for (int input : op.output_inputs) {
    if (input >= 0) handle.written[input] = true;
  }
  return handle;
}

py::dict AllFacts() {
  py::dict facts;
  for (size_t i = 0; i < handles.size(); ++i) {
    facts[py::str(handles[i].op->name)] = Facts(i);
  }
  return facts;
}

// What a signal's handler raised while an operator waited. Only the main thread, with the GIL,
// comes here.
PyObject* interrupt[3] = {};

// Run by the interpreter as soon as the operator's call has returned to it.
int RaiseInterrupt(void*) {
  if (interrupt[0] == nullptr) return 0;
  PyErr_Restore(interrupt[0], interrupt[1], interrupt[2]);
  for (PyObject*& part : interrupt) part = nullptr;
  return -1;
}

// Lets Python handle the signals that have come; whether a handler raised. Python's handlers run in
// the main thread only, and that one may wait for the GIL: it is here, so nobody who has the GIL
// waits for what this thread holds.
bool HandleSignals() {
  if (syscall(SYS_gettid) != getpid() || !Py_IsInitialized()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  if (raised) {
    // The operator may have been called by a program, whose executor must see no exception.
    for (PyObject* part : interrupt) Py_XDECREF(part);
    PyErr_Fetch(&interrupt[0], &interrupt[1], &interrupt[2]);
    if (Py_AddPendingCall(RaiseInterrupt, nullptr) != 0) PyErr_SetInterrupt();
  }
  PyGILState_Release(state);
  return raised;
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
  const auto watch = reinterpret_cast<decltype(&fastattn_set_interrupt_check)>(
      dlsym(library, "fastattn_set_interrupt_check"));
  if (watch == nullptr) throw std::runtime_error(path + " is of another build");
  watch(HandleSignals);
  // Calls may be under way with the handles of a table that is bound already.
  if (!handles.empty() && handles.front().op == table->ops->front()) return AllFacts();
  std::vector<Handle> found;
  for (const DirectOp* op : *table->ops) found.push_back(MakeHandle(*op));
  handles = std::move(found);
  check_arguments = table->check;
  return AllFacts();
}

// flat(tensor [T, ..]) -> [T, rest] over the same memory. None: declined.
PyObject* Flat(PyObject*, PyObject* object) {
  if (!paddle::pybind::PyCheckTensor(object)) Py_RETURN_NONE;
  try {
    const Tensor flat = FlatView(paddle::pybind::CastPyArg2Tensor(object, 0));
    if (flat.defined()) return paddle::pybind::ToPyObject(flat);
  } catch (const std::exception&) {
  }
  Py_RETURN_NONE;
}

// Sizes or strides from a list of ints; false for anything else.
bool TakeSizes(PyObject* list, Sizes* sizes) {
  if (!PyList_Check(list) || PyList_GET_SIZE(list) > common::DDim::kMaxRank) return false;
  int64_t values[common::DDim::kMaxRank];
  const Py_ssize_t count = PyList_GET_SIZE(list);
  for (Py_ssize_t i = 0; i < count; ++i) {
    DirectAttr attr;
    if (!TakeInteger(PyList_GET_ITEM(list, i), true, &attr)) return false;
    values[i] = attr.integer;
  }
  *sizes = Sizes(values, static_cast<size_t>(count));
  return true;
}

// view(tensor, shape) -> the tensor in that shape, itself where it has it. A size may be -1.
// view(tensor, shape, strides, first) -> some of its elements.
// None: declined, as a tensor that wants a gradient is, which a view would not pass on.
PyObject* View(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Sizes shape, strides;
  DirectAttr first;
  if ((count != 2 && count != 4) || !paddle::pybind::PyCheckTensor(args[0]) ||
      !TakeSizes(args[1], &shape)) {
    Py_RETURN_NONE;
  }
  if (count == 4 && (!TakeSizes(args[2], &strides) || strides.size() != shape.size() ||
                     !TakeInteger(args[3], true, &first))) {
    Py_RETURN_NONE;
  }
  try {
    const Tensor& tensor = paddle::pybind::CastPyArg2Tensor(args[0], 0);
    if (count == 2 && tensor.defined() && tensor.is_dense_tensor()) {
      shape = Resolved(shape, tensor.numel());
      if (SizesOf(tensor) == shape) {
        Py_INCREF(args[0]);
        return args[0];
      }
    }
    if (!WantsGradient(args[0], tensor)) {
      const Tensor view = ViewOfSome(tensor, shape, count == 4 ? &strides : nullptr, first.integer);
      if (view.defined()) return paddle::pybind::ToPyObject(view);
    }
  } catch (const std::exception&) {
  }
  Py_RETURN_NONE;
}

// unchanged(object, kinds, names, seen): see HoldsStill, of the object's __dict__.
PyObject* Unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]) || !PyList_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError, "unchanged(object, kinds, names, seen)");
    return nullptr;
  }
  PyObject* own = PyObject_GetAttr(args[0], own_dict);
  if (own == nullptr) return nullptr;
  const bool holds = PyDict_Check(own) && HoldsStill(own, args[1], args[2], args[3]);
  Py_DECREF(own);
  return PyBool_FromLong(holds);
}

template <typename Function>
PyCFunction Method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"call", Method(Call), METH_FASTCALL,
     "call(handle, inputs, attrs, gradients_count) -> list of outputs, or None: declined."},
    {"flat", Flat, METH_O, "flat(tensor [T, ..]) -> [T, rest] over the same memory, or None."},
    {"view", Method(View), METH_FASTCALL,
     "view(tensor, shape[, strides, first]) -> the same memory in that shape, or None."},
    {"unchanged", Method(Unchanged), METH_FASTCALL,
     "unchanged(object, kinds, names, seen) -> whether its attributes are what was seen before."},
};

}  // namespace

}  // namespace fastattn::api

PYBIND11_MODULE(_direct, m) {
  using namespace fastattn::api;
  m.doc() = "Operators, called around Paddle's registry.";
  stop_gradient = PyUnicode_InternFromString("stop_gradient");
  own_dict = PyUnicode_InternFromString("__dict__");
  m.def("bind", &Bind, "Loads a library of operators; returns facts of each by its name.");
  m.def("bound", &Bound,
        "bound(handle, fixed, open, gradients_count): the operator with most arguments fixed.");
  m.def("check", &Check,
        "check(handle, inputs, attrs): checks arguments; an input is None or (dtype, shape).");
  for (PyMethodDef& method : methods) {
    m.add_object(method.ml_name,
                 py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
  }
}
