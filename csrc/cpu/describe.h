// The Python functions by which a list of tensors is known again.
#pragma once

#include <Python.h>

namespace smart_kernels {

// describe(tensors: list) -> bytes | None: address, device, dtype, shape and strides of each; None where one is of a
// subclass, or where this torch has no DLPack C exchange interface
PyObject* describe(PyObject* module, PyObject* tensors);

// matches(tensors: list, description: bytes, places: bytes) -> bool: whether describe(tensors) would return that. The
// places are two addresses for each tensor, of itself and of its storage when it was described, which are not read.
PyObject* matches(PyObject* module, PyObject* arguments);

}  // namespace smart_kernels
