#pragma once

#include "common/matrix.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sphere {

template <class T>
constexpr Type type_of = sizeof(T) == sizeof(float) ? Type::float32 : Type::float64;

// The part of a matrix that begins at (row, col).
inline Matrix part(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    char* start = static_cast<char*>(m.data) + (row * m.row_stride + col * m.col_stride) * size_of(m.type);
    return {start, m.type, rows, cols, m.row_stride, m.col_stride};
}

inline Matrix transposed(const Matrix& m) { return {m.data, m.type, m.cols, m.rows, m.col_stride, m.row_stride}; }

// Calls f(index, threads) for every matrix of a batch: small ones side by side, each on one thread; large ones in turn.
template <class F>
void for_each_matrix(int64_t count, int64_t rows, int threads, F f) {
    if (count > 1 && rows <= TILE) {
        parallel_for(count, usable_threads(threads), [&](int64_t i, int) { f(i, 1); });
    } else {
        for (int64_t i = 0; i < count; ++i) f(i, usable_threads(threads));
    }
}

}  // namespace sphere
