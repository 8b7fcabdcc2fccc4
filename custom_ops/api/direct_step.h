// A layer's step of a backend in one call: rope_write_cache_kv, paged_attention, and the result
// flat. Everything out of the ordinary is declined, and fastattn/backends/paged.py then does the
// same in Python, where half of a step's host time would be the interpreter's.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "api/direct_call.h"
#include "common/types.h"
#include "plan/step_lengths.h"

namespace fastattn::api {

// What a layer's steps have in common: the fields of the tuple that LayerFacts makes.
enum StepPlan : Py_ssize_t {
  kWriteHandle,    // of rope_write_cache_kv
  kWriteTensors,   // (q_norm_weight, k_norm_weight, qkv_bias, q_scale)
  kWriteAttrs,     // its attributes
  kAttendHandle,   // of paged_attention
  kAttendTensors,  // (sinks, mask_offsets, out_scale, out)
  kAttendAttrs,    // its attributes behind the two lengths
  kNumCaches,      // length of the list of caches
  kFirstCache,     // the layer's first in it
  kHolders,        // the last three: see HoldsStill
  kNames,
  kSeen,
  kStepPlanSize
};

// Names of a step's fields: those that it must have, then those that may be absent.
constexpr int kStepNeeded = 4;
constexpr const char* kStepFields[] = {
    "block_tables", "cu_seqlens_q",       "seq_lens_decoder", "seq_lens_this_time",
    "rotary_embs",  "batch_id_per_token", "exist_prefill",    "rope_already_applied"};
constexpr int kNumStepFields = sizeof(kStepFields) / sizeof(kStepFields[0]);
inline PyObject* step_names[kNumStepFields] = {};

// Where rope_write_cache_kv takes cu_seqlens_q and seq_lens_this_time.
constexpr int kStartsInput = 5, kLengthsInput = 7;

inline void InternStepNames() {
  for (int i = 0; i < kNumStepFields; ++i) {
    step_names[i] = PyUnicode_InternFromString(kStepFields[i]);
  }
}

// A step's fields, held while it runs.
class StepFields {
 public:
  StepFields() = default;
  StepFields(const StepFields&) = delete;
  StepFields& operator=(const StepFields&) = delete;
  ~StepFields() {
    for (PyObject* value : values_) Py_XDECREF(value);
  }

  // 0 where a field is missing, or Q and K are rotated already: the step is declined. -1: Python's
  // error is set. May run Python code.
  int Read(PyObject* forward_meta) {
    for (int i = 0; i < kNumStepFields; ++i) {
      values_[i] = PyObject_GetAttr(forward_meta, step_names[i]);
      if (values_[i] == nullptr) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear();
        Py_INCREF(Py_None);
        values_[i] = Py_None;
      }
      if (i <= kStepNeeded && values_[i] == Py_None) return 0;
    }
    const int rotated = PyObject_IsTrue(values_[kNumStepFields - 1]);
    return rotated < 0 ? -1 : 1 - rotated;
  }

  PyObject* const* sequences() const { return values_; }
  PyObject* rotary_embs() const { return values_[kStepNeeded]; }
  PyObject* batch_ids() const { return values_[kStepNeeded + 1]; }
  // What a server says in some other way than by a bool would have to be asked of the device.
  bool prefills() const { return values_[kStepNeeded + 2] == Py_True; }

 private:
  PyObject* values_[kNumStepFields] = {};
};

// An operator of a step: its inputs, attributes and results.
class StepCall {
 public:
  explicit StepCall(PyObject* handle) : handle_(handles.at(PyLong_AsSize_t(handle))) {}

  Inputs& inputs() { return inputs_; }
  DirectAttr* attrs() { return attrs_; }
  const Tensor& result() const { return results_[0]; }

  // Takes the objects as the remaining inputs; false to decline.
  bool Take(const std::vector<PyObject*>& objects) {
    if (inputs_.size() + static_cast<int>(objects.size()) != handle_.op->num_inputs()) return false;
    bool wants_gradient = false;
    return TakeInputs(handle_, objects.data(), false, &inputs_, &wants_gradient) && !wants_gradient;
  }

  bool TakeAttrs(PyObject* tuple, size_t first) {
    return handle_.op->kinds.size() == first + PyTuple_GET_SIZE(tuple) &&
           api::TakeAttrs(handle_, tuple, first, attrs_);
  }

  // Sets Python's error, (text, name of the operator), and returns false if the operator fails.
  bool Run() {
    const std::string message = RunWithoutGil(*handle_.op, inputs_, attrs_, &results_);
    if (!message.empty()) {
      PyObject* text = Py_BuildValue("(ss)", message.c_str(), handle_.op->name.c_str());
      if (text != nullptr) PyErr_SetObject(PyExc_RuntimeError, text);
      Py_XDECREF(text);
      return false;
    }
    CountWrites(handle_, inputs_);
    return true;
  }

 private:
  const Handle& handle_;
  Inputs inputs_;
  DirectAttr attrs_[kMostAttrs];
  std::vector<Tensor> results_;
};

inline void Append(PyObject* tuple, std::vector<PyObject*>* objects) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    objects->push_back(PyTuple_GET_ITEM(tuple, i));
  }
}

// The numbers of new tokens and of keys of the longest sequence: those that the host knows (a
// tuple), or what it can tell of the step's kind and the shapes. `bounds` are the new tokens of a
// decoding sequence and the keys of any, at most.
inline bool TakeLengths(PyObject* lengths, PyObject* bounds, const Tensor& qkv,
                        const StepFields& fields, DirectAttr* attrs) {
  PyObject* given = lengths == Py_None ? bounds : lengths;
  if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != 2) return false;
  if (!TakeInteger(PyTuple_GET_ITEM(given, 0), true, &attrs[0]) ||
      !TakeInteger(PyTuple_GET_ITEM(given, 1), true, &attrs[1])) {
    return false;
  }
  if (lengths != Py_None) return true;
  const Tensor& tables = paddle::pybind::CastPyArg2Tensor(fields.sequences()[0], 0);
  const Tensor& starts = paddle::pybind::CastPyArg2Tensor(fields.sequences()[1], 0);
  if (tables.dims().size() != 2) return false;
  const int64_t seqs = std::max<int64_t>(starts.numel() - 1, 1);
  attrs[0].integer = NewTokensOfLongest(qkv.dims()[0], seqs, attrs[0].integer, fields.prefills());
  attrs[1].integer = std::min(attrs[1].integer, tables.dims()[1] * kBlockSize);
  return true;
}

// The caches of the layer (K, V and, of a dynamic type, their scales), held while the step runs:
// Python code that runs meanwhile may empty the list. Nothing: declined.
inline std::vector<py::object> CachesOf(PyObject* plan, PyObject* caches, Py_ssize_t count) {
  const Py_ssize_t num_caches = PyLong_AsSsize_t(PyTuple_GET_ITEM(plan, kNumCaches));
  const Py_ssize_t first = PyLong_AsSsize_t(PyTuple_GET_ITEM(plan, kFirstCache));
  std::vector<py::object> found;
  if (!PyList_CheckExact(caches) || PyList_GET_SIZE(caches) != num_caches) return found;
  if (first < 0 || first > num_caches - count) return found;
  for (Py_ssize_t i = first; i < first + count; ++i) {
    if (PyList_GET_ITEM(caches, i) == Py_None) return {};
    found.push_back(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(caches, i)));
  }
  return found;
}

// Whether a tuple has what LayerFacts puts into a plan.
inline bool IsPlan(PyObject* plan) {
  if (!PyTuple_Check(plan) || PyTuple_GET_SIZE(plan) != kStepPlanSize) return false;
  for (Py_ssize_t i : {kWriteHandle, kAttendHandle, kNumCaches, kFirstCache}) {
    int overflow = 0;
    PyObject* item = PyTuple_GET_ITEM(plan, i);
    if (!PyLong_CheckExact(item)) return false;
    const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
    const bool is_handle = i == kWriteHandle || i == kAttendHandle;
    if (overflow != 0 || value < 0) return false;
    if (is_handle && value >= static_cast<long long>(handles.size())) return false;
  }
  for (Py_ssize_t i :
       {kWriteTensors, kWriteAttrs, kAttendTensors, kAttendAttrs, kHolders, kNames}) {
    if (!PyTuple_Check(PyTuple_GET_ITEM(plan, i))) return false;
  }
  return PyList_Check(PyTuple_GET_ITEM(plan, kSeen));
}

// Whether there are new lengths of more sequences than there are starts. Python cuts them.
inline bool HasSlotsThatRest(const Inputs& inputs) {
  const Tensor* starts = inputs[kStartsInput];
  const Tensor* lengths = inputs[kLengthsInput];
  if (starts == nullptr || lengths == nullptr) return false;
  return starts->dims().size() > 0 && lengths->dims().size() > 0 &&
         lengths->dims()[0] >= starts->dims()[0];
}

inline PyObject* RunStep(PyObject* const* args) {
  PyObject *plan = args[0], *own = args[1], *qkv = args[4], *scales = args[7];
  const bool dynamic = scales == Py_None;
  const std::vector<py::object> caches = CachesOf(plan, args[2], dynamic ? 4 : 2);
  if (caches.empty() || !PyDict_Check(own) ||
      !HoldsStill(own, PyTuple_GET_ITEM(plan, kHolders), PyTuple_GET_ITEM(plan, kNames),
                  PyTuple_GET_ITEM(plan, kSeen))) {
    Py_RETURN_NONE;
  }
  StepFields fields;
  const int read = fields.Read(args[3]);
  if (read < 0) return nullptr;
  if (read == 0 || !paddle::pybind::PyCheckTensor(qkv)) Py_RETURN_NONE;
  PyObject* const* seqs = fields.sequences();
  PyObject* const key = caches[0].ptr();
  PyObject* const value = caches[1].ptr();
  PyObject* const k_scales = dynamic ? caches[2].ptr() : PyTuple_GET_ITEM(scales, 0);
  PyObject* const v_scales = dynamic ? caches[3].ptr() : PyTuple_GET_ITEM(scales, 1);

  StepCall write(PyTuple_GET_ITEM(plan, kWriteHandle));
  std::vector<PyObject*> objects = {qkv, key, value, fields.rotary_embs()};
  objects.reserve(kMostInputs);
  objects.insert(objects.end(), seqs, seqs + kStepNeeded);
  Append(PyTuple_GET_ITEM(plan, kWriteTensors), &objects);
  objects.insert(objects.end(), {k_scales, v_scales, fields.batch_ids()});
  if (!write.Take(objects) || !write.TakeAttrs(PyTuple_GET_ITEM(plan, kWriteAttrs), 0)) {
    Py_RETURN_NONE;
  }
  const Tensor& fused = *write.inputs()[0];
  if (fused.dims().size() != 2 || fused.dims()[0] == 0) Py_RETURN_NONE;
  if (HasSlotsThatRest(write.inputs())) Py_RETURN_NONE;

  // Everything that may be declined comes before the cache is written.
  StepCall attend(PyTuple_GET_ITEM(plan, kAttendHandle));
  attend.inputs().Add(&fused);  // stands for the rotated queries, which are not there yet
  objects.assign({key, value});
  objects.insert(objects.end(), seqs, seqs + kStepNeeded);
  objects.insert(objects.end(), {k_scales, v_scales, Py_None});
  Append(PyTuple_GET_ITEM(plan, kAttendTensors), &objects);
  if (!attend.Take(objects) || !attend.TakeAttrs(PyTuple_GET_ITEM(plan, kAttendAttrs), 2) ||
      !TakeLengths(args[5], args[6], fused, fields, attend.attrs())) {
    Py_RETURN_NONE;
  }
  // Where the host knows the lengths, clusters mostly take the call for certain.
  StepArrivals arrivals;
  arrivals.max_seqlen_q = static_cast<int>(attend.attrs()[0].integer);
  arrivals.max_seqlen_k = static_cast<int>(attend.attrs()[1].integer);
  const StepScope scope(current_step(), args[5] == Py_None ? &arrivals : nullptr);
  if (!write.Run()) return nullptr;
  *attend.inputs()[0] = write.result();
  if (!attend.Run()) return nullptr;
  const Tensor flat = FlatView(attend.result());
  return paddle::pybind::ToPyObject(flat.defined() ? flat : attend.result());
}

// step(plan, own, caches, forward_meta, qkv, lengths, bounds, scales): the attention [T, H * D]
// of a layer whose __dict__ is `own`, or None. scales: (K's, V's) of a static type, (None, None) of
// one without, None of a dynamic type, whose scales follow its caches.
inline PyObject* Step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8 || !IsPlan(args[0]) ||
      (args[7] != Py_None && (!PyTuple_Check(args[7]) || PyTuple_GET_SIZE(args[7]) != 2))) {
    PyErr_SetString(PyExc_TypeError,
                    "step(plan, own, caches, forward_meta, qkv, lengths, bounds, scales)");
    return nullptr;
  }
  try {
    return RunStep(args);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace fastattn::api
