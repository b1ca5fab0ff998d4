#pragma once

#include <cstdint>

namespace sphere {

enum class Type { float64, float32, bfloat16, float16 };

// A matrix in somebody else's memory; strides count elements and may have any value.
struct Matrix {
    void* data;
    Type type;
    int64_t rows, cols;
    int64_t row_stride, col_stride;
};

// The exponent s of the Riesz energy, and what the distance is.
struct Riesz {
    double s;
    bool angular;
    bool half_space;
};

}  // namespace sphere
