// The Python module of the CUDA kernels. Each file here registers its own with the dispatcher when this is loaded.
#include <Python.h>

namespace {
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", "Compiled CUDA kernels of smart_kernels.", -1, nullptr};
}

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&definition); }
