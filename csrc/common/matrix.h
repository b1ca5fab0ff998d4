#pragma once

#include <cstdint>

// Marks functions that the CPU's code and the CUDA kernels both call.
#ifdef __CUDACC__
#define SHARED_CODE __host__ __device__
#else
#define SHARED_CODE
#endif

namespace sphere {

enum class Type { float64, float32, bfloat16, float16 };

SHARED_CODE inline int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// A matrix in somebody else's memory; strides count elements and may have any value.
struct Matrix {
    void* data;
    Type type;
    int64_t rows, cols;
    int64_t row_stride, col_stride;
};

// Matrices of one shape; strides count elements and may have any value. Those of a batch without data have none.
struct Batch {
    Matrix first;
    int64_t count, stride;

    SHARED_CODE Matrix operator[](int64_t i) const {
        Matrix m = first;
        if (m.data) m.data = static_cast<char*>(m.data) + i * stride * size_of(m.type);
        return m;
    }
};

// The exponent s of the Riesz energy, and what the distance is.
struct Riesz {
    double s;
    bool angular;
    bool half_space;
};

}  // namespace sphere
