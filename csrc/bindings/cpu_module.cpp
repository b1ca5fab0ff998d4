#include <pybind11/pybind11.h>

#include "cpu/features.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Compiled CPU code of sphere_kernels. Tensors cross as addresses, sizes and strides, checked in Python.";

    m.def(
        "cpu_features",
        [] {
            py::dict features;
            for (const auto& feature : sphere::cpu_features()) features[feature.name] = feature.usable;
            return features;
        },
        "Instruction set extensions by their Linux name, and whether this machine can use them.");
}
