// The dflash operator namespace, and the module init that lets Python's packaging treat the library as an extension.
// Each op group adds its own schemas with STABLE_TORCH_LIBRARY_FRAGMENT in csrc/api/<group>.cpp.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "api/check.h"

STABLE_TORCH_LIBRARY(dflash, library) { (void)library; }

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module_definition); }
