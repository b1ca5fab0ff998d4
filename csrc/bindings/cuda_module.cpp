#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/views.h"
#include "cuda/launch.h"

namespace py = pybind11;
using namespace sphere;

namespace {

// Launches without the interpreter's lock.
template <class F>
void launch(F f) {
    cuda::Status status;
    {
        py::gil_scoped_release unlocked;
        status = f();
    }
    if (status.code == 0) return;
    const std::string message = cuda::message_of(status.code);
    if (cuda::no_device(status.code)) throw std::runtime_error("no CUDA driver or device: " + message);
    throw std::runtime_error(std::string(status.kernel) + " was not launched: " + message + " (CUDA error " +
                             std::to_string(status.code) + ")");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of sphere_kernels. Tensors cross as addresses, sizes and strides, checked in Python.";
    m.attr("emulated") = cuda::toolkit() == 0;

    m.def(
        "device_count",
        [] {
            int count = 0;
            const int code = cuda::device_count(&count);
            return code == 0 ? count : 0;
        },
        "CUDA devices that can be used; 0 without a driver.");
    m.def("toolkit", &cuda::toolkit, "Version of the CUDA toolkit that compiled it, 1000 major + 10 minor.");
    m.def("architectures", &cuda::architectures, "What there is machine code for, 10 major + minor.");

    m.def(
        "pair_energy_workspace",
        [](const py::tuple& weight, double s, bool angular, bool half_space) {
            return cuda::pair_energy_workspace(as_batch(weight), {s, angular, half_space});
        },
        "Bytes.");
    m.def(
        "pair_energy",
        [](const py::tuple& weight, double s, bool angular, bool half_space, int precision, uintptr_t workspace,
           uintptr_t energies, uintptr_t stream) {
            const Batch rows = as_batch(weight);
            launch([&] {
                return cuda::pair_energy(rows, {s, angular, half_space}, cuda::Precision(precision),
                                         as_pointer<void>(workspace), as_pointer<double>(energies),
                                         as_pointer<void>(stream));
            });
        },
        "Energy of every row, to fp64 energies[count, rows], contiguous.");
    m.def(
        "gram_update_energy_workspace",
        [](const py::tuple& gram, const py::tuple& first) {
            return cuda::gram_update_energy_workspace(as_batch(gram), as_batch(first));
        },
        "Bytes.");
    m.def(
        "gram_update_energy",
        [](const py::tuple& gram, const py::tuple& first, const py::tuple& second, uintptr_t diagonal,
           const py::object& weight, double s, bool angular, bool half_space, int precision, uintptr_t workspace,
           uintptr_t energies, uintptr_t stream) {
            const Batch grams = as_batch(gram), a = as_batch(first), b = as_batch(second);
            const OptionalBatch rows(weight);
            launch([&] {
                return cuda::gram_update_energy(grams, a, b, as_pointer<void>(diagonal), rows.get(),
                                                {s, angular, half_space}, cuda::Precision(precision),
                                                as_pointer<void>(workspace), as_pointer<double>(energies),
                                                as_pointer<void>(stream));
            });
        },
        "gram += first second^T, mirrored, with this diagonal[count, rows]; all of one type. The energy of every "
        "neuron "
        "to fp64 energies[count, rows].");
    m.def(
        "product",
        [](const py::tuple& left, const py::tuple& right, const py::object& addend, const py::tuple& out, double factor,
           bool accumulate, bool wide, int precision, uintptr_t stream) {
            const Batch a = as_batch(left), b = as_batch(right), to = as_batch(out);
            const OptionalBatch more(addend);
            launch([&] {
                return cuda::product(a, b, more.get(), to, factor, accumulate, wide, cuda::Precision(precision),
                                     as_pointer<void>(stream));
            });
        },
        "out = (accumulate ? out : 0) + addend + factor left right, in fp64 or fp32, rounded once to the type of out.");
}
