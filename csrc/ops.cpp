// The Python module of the CPU kernels. Each file in cpu/ registers its own with the dispatcher when this is loaded.
#include <Python.h>

#include "cpu/blocks.h"
#include "cpu/describe.h"
#include "cpu/isa.h"

namespace {
PyObject* empty_cache(PyObject*, PyObject*) { return PyLong_FromLongLong(smart_kernels::empty_cache()); }
PyMethodDef methods[] = {
    {"describe", smart_kernels::describe, METH_O, nullptr},
    {"matches", smart_kernels::matches, METH_VARARGS, nullptr},
    {"empty_cache", empty_cache, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Compiled CPU kernels of smart_kernels.", -1, methods};
}

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddStringConstant(module, "isa", smart_kernels::isa_name());
  return module;
}
