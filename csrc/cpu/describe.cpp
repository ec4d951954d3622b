// Reads a list of tensors through DLPack's C exchange interface, some 30 ns each: no reference is taken, so none is
// given back under the interpreter's lock, which is what tensor lists cost when they pass the dispatcher.
#include "cpu/describe.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace smart_kernels {
namespace {

// As in dlpack.h, version 1.3, whose layout is fixed
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  DLPackExchangeAPI* previous;
  void (*others[3])();
  int (*dltensor_from_py_object)(void* object, DLTensor* out);
};

struct Torch {
  PyObject *tensor = nullptr, *parameter = nullptr;  // other subclasses may not hold what they seem to
  const DLPackExchangeAPI* api = nullptr;

  Torch() {
    PyObject* torch = PyImport_ImportModule("torch");
    PyObject* nn = torch ? PyObject_GetAttrString(torch, "nn") : nullptr;
    tensor = torch ? PyObject_GetAttrString(torch, "Tensor") : nullptr;
    parameter = nn ? PyObject_GetAttrString(nn, "Parameter") : nullptr;
    PyObject* capsule = tensor ? PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__") : nullptr;
    if (capsule) api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    if (api && (api->version.major != 1 || !api->dltensor_from_py_object)) api = nullptr;
    Py_XDECREF(capsule);
    Py_XDECREF(nn);
    Py_XDECREF(torch);
    PyErr_Clear();
  }
};

const Torch& torch() {
  static const Torch found;
  return found;
}

// f(word) for all that the description of a list is made of, until f returns false: 1 when it never has, 0 then and where
// a tensor cannot be read so, -1 with an exception where `tensors` is no list. before(i) is called before the i-th is.
template <typename F, typename Before>
int for_each_word(PyObject* tensors, F&& f, Before&& before) {
  const Py_ssize_t count = PyList_Size(tensors);
  if (count < 0) return -1;
  if (!torch().api) return 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    before(i);
    PyObject* object = PyList_GetItem(tensors, i);
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch().tensor && type != torch().parameter) return 0;
    DLTensor x;
    if (torch().api->dltensor_from_py_object(object, &x) != 0) {
      PyErr_Clear();
      return 0;
    }
    int64_t device, kind;
    std::memcpy(&device, &x.device, sizeof device);
    std::memcpy(&kind, &x.ndim, sizeof kind);  // and the dtype, which follows
    if (!f(reinterpret_cast<int64_t>(x.data) + static_cast<int64_t>(x.byte_offset)) || !f(device) || !f(kind)) return 0;
    for (int d = 0; d < x.ndim; ++d)
      if (!f(x.shape[d]) || !f(x.strides[d])) return 0;
  }
  return 1;
}

}  // namespace

PyObject* describe(PyObject*, PyObject* tensors) {
  std::vector<int64_t> words;
  const auto keep = [&](int64_t word) {
    words.push_back(word);
    return true;
  };
  const int result = for_each_word(tensors, keep, [](Py_ssize_t) {});
  if (result < 0) return nullptr;
  if (result == 0) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(
      reinterpret_cast<const char*>(words.data()), static_cast<Py_ssize_t>(words.size() * sizeof(int64_t)));
}

PyObject* matches(PyObject*, PyObject* arguments) {
  constexpr Py_ssize_t kAhead = 16;
  PyObject *tensors, *description, *places;
  if (!PyArg_ParseTuple(arguments, "OSS", &tensors, &description, &places)) return nullptr;
  const char* next = PyBytes_AsString(description);
  const char* const end = next + PyBytes_Size(description);
  const char* const* place = reinterpret_cast<const char* const*>(PyBytes_AsString(places));
  const Py_ssize_t known = std::min<Py_ssize_t>(PyBytes_Size(places) / (2 * sizeof *place), PyList_Size(tensors));
  const auto same = [&](int64_t word) {
    const bool equal = next != end && std::memcmp(next, &word, sizeof word) == 0;
    next += sizeof word;
    return equal;
  };
  // What will be read of the tensors is asked for as they come nearer, where it was when the list was described:
  // prefetching what lies elsewhere by now does nothing.
  const int result = for_each_word(tensors, same, [&](Py_ssize_t i) {
    if ((i += kAhead) >= known) return;
    __builtin_prefetch(PyList_GetItem(tensors, i));
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(place[2 * i] + line);
    for (int line = 0; line < 128; line += 64) __builtin_prefetch(place[2 * i + 1] + line);
  });
  return result < 0 ? nullptr : PyBool_FromLong(result == 1 && next == end);
}

}  // namespace smart_kernels
