// Calls of an operator of which most arguments stay the same, as a layer's do from step to step:
// these are named, found and converted once.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "api/direct_call.h"

namespace fastattn::api {

struct BoundCall {
  // An argument that every call gives: an input, or an attribute.
  struct Open {
    bool attr = false;
    int index = 0;
  };

  Handle handle;
  std::vector<Open> open;      // in the order of a call's arguments
  py::object gradients_count;  // whether a tensor that wants a gradient is a reason to decline
  // Fixed arguments, and what keeps them alive.
  PyObject* inputs[kMostInputs] = {};
  DirectAttr attrs[kMostAttrs];
  std::vector<py::object> held;
};

inline constexpr char kBoundCall[] = "fastattn.BoundCall";

// The first result, or None: declined.
inline PyObject* RunBound(const BoundCall& call, PyObject* const* args) {
  const DirectOp& op = *call.handle.op;
  PyObject* objects[kMostInputs];
  std::copy_n(call.inputs, kMostInputs, objects);
  DirectAttr attrs[kMostAttrs];
  std::copy_n(call.attrs, op.kinds.size(), attrs);
  for (const BoundCall::Open& open : call.open) {
    PyObject* const arg = *args++;
    if (!open.attr) {
      objects[open.index] = arg;
    } else if (!TakeAttr(op.kinds[open.index], arg, &attrs[open.index])) {
      Py_RETURN_NONE;
    }
  }
  Inputs inputs;
  bool wants_gradient = false;
  if (!TakeInputs(call.handle, objects, false, &inputs, &wants_gradient)) Py_RETURN_NONE;
  if (wants_gradient && call.gradients_count().cast<bool>()) Py_RETURN_NONE;
  std::vector<Tensor> results;
  const std::string message = RunWithoutGil(op, inputs, attrs, &results);
  if (!message.empty()) {
    PyErr_SetString(PyExc_RuntimeError, message.c_str());
    return nullptr;
  }
  CountWrites(call.handle, inputs);
  return paddle::pybind::ToPyObject(results.at(0));
}

// What bound() returns is this function, with the call as its first argument.
inline PyObject* CallBound(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  const auto* call = static_cast<const BoundCall*>(PyCapsule_GetPointer(capsule, kBoundCall));
  if (call == nullptr) return nullptr;
  if (count != static_cast<Py_ssize_t>(call->open.size())) {
    PyErr_Format(PyExc_TypeError, "%s: expected %zu arguments, got %zd",
                 call->handle.op->name.c_str(), call->open.size(), count);
    return nullptr;
  }
  try {
    return RunBound(*call, args);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Number of an argument of that name; -1 without one. An attribute's name ends at a colon.
inline int FindName(const std::vector<std::string>& names, const std::string& name) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i].substr(0, names[i].find(':')) == name) return static_cast<int>(i);
  }
  return -1;
}

// bound(handle, fixed, open, gradients_count): a function of the arguments named in `open`, for an
// operator whose other arguments `fixed` has by name. None where one is not as the operator takes
// it; absent inputs are None.
inline py::object Bound(size_t index, const py::dict& fixed, const std::vector<std::string>& open,
                        py::object gradients_count) {
  if (index >= handles.size()) throw py::index_error("no operator of this number");
  const DirectOp& op = *handles[index].op;
  auto call = std::make_unique<BoundCall>();
  call->handle = handles[index];
  call->gradients_count = std::move(gradients_count);
  std::vector<bool> inputs(op.inputs.size()), attrs(op.attrs.size());
  const auto find = [&](const std::string& name) {
    BoundCall::Open found{false, FindName(op.inputs, name)};
    if (found.index < 0) found = {true, FindName(op.attrs, name)};
    if (found.index < 0) throw py::type_error(op.name + ": no argument " + name);
    std::vector<bool>& seen = found.attr ? attrs : inputs;
    if (seen[found.index]) throw py::type_error(op.name + ": " + name + " is given twice");
    seen[found.index] = true;
    return found;
  };
  for (const std::string& name : open) call->open.push_back(find(name));
  for (const auto& [key, value] : fixed) {
    const BoundCall::Open found = find(py::cast<std::string>(key));
    call->held.push_back(py::reinterpret_borrow<py::object>(value));
    if (!found.attr) {
      call->inputs[found.index] = value.ptr();
    } else if (!TakeAttr(op.kinds[found.index], value.ptr(), &call->attrs[found.index])) {
      return py::none();
    }
  }
  const auto all = [](const std::vector<bool>& seen) {
    return std::find(seen.begin(), seen.end(), false) == seen.end();
  };
  if (!all(inputs) || !all(attrs)) throw py::type_error(op.name + ": an argument is missing");
  static PyMethodDef method = {
      "bound", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(CallBound)),
      METH_FASTCALL, "The operator, with the arguments that are open."};
  const py::capsule capsule(call.release(), kBoundCall, [](PyObject* self) {
    delete static_cast<BoundCall*>(PyCapsule_GetPointer(self, kBoundCall));
  });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, capsule.ptr()));
}

}  // namespace fastattn::api
