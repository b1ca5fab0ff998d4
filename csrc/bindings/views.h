#pragma once

#include <pybind11/pybind11.h>

#include "common/matrix.h"

namespace sphere {

// Python's view of matrices [count, rows, cols]: (address, type, shape and strides), checked there.
inline Batch as_batch(const pybind11::tuple& t) {
    const auto at = [&](size_t i) { return t[i].cast<int64_t>(); };
    const Type type = static_cast<Type>(t[1].cast<int>());
    return {{reinterpret_cast<void*>(t[0].cast<uintptr_t>()), type, at(3), at(4), at(6), at(7)}, at(2), at(5)};
}

// The same, or nothing for None.
struct OptionalBatch {
    Batch batch;
    bool there;

    explicit OptionalBatch(const pybind11::object& t)
        : batch(t.is_none() ? Batch{} : as_batch(t)), there(!t.is_none()) {}
    const Batch* get() const { return there ? &batch : nullptr; }
};

template <class T>
T* as_pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace sphere
