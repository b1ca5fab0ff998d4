// Moving matrices: norms, packing into panels, the product of panels, and storing tiles.

#pragma once

#include "cpu/transpose.h"
#include "cpu/vector.inl"

namespace {

constexpr int64_t DEPTH_BLOCK = 256;  // depth of a product whose panels stay in the first two caches
constexpr int PANELS = 3;             // panels of columns that the micro-kernel holds in registers

// Rows of the micro-kernel. Registers: ROWS * PANELS accumulators, PANELS columns, one broadcast.
#if defined(__AVX512F__)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif

template <class T>
constexpr int STRIP = ROWS < LANES<T> ? ROWS : LANES<T>;  // a strip of rows lies within one panel

template <class E>
double row_norm(const E* row, int64_t count, int64_t stride) {
    if (stride != 1) {
        double total = 0;
        for (int64_t k = 0; k < count; ++k) {
            const double x = widen(row[k * stride]);
            total += x * x;
        }
        return sqrt(total);
    }
    double sums[16] = {};
    int64_t k = 0;
    for (; k + 16 <= count; k += 16)
        for (int l = 0; l < 16; ++l) {
            const double x = widen(row[k + l]);
            sums[l] += x * x;
        }
    for (int l = 0; k < count; ++k, ++l) {
        const double x = widen(row[k]);
        sums[l] += x * x;
    }
    double total = 0;
    for (double part : sums) total += part;
    return sqrt(total);
}

template <class T>
void row_norms(const Matrix& matrix, int64_t first, int64_t count, double* norms) {
    with_elements(matrix, [&](auto* elements) {
        for (int64_t i = 0; i < count; ++i)
            norms[i] = row_norm(elements + (first + i) * matrix.row_stride, matrix.cols, matrix.col_stride);
    });
}

// to[0..count) from elements a stride apart, scaled.
template <class T, class E>
INLINE void read(const E* from, int64_t stride, int64_t count, double scale, bool scaled, T* to) {
    if (stride == 1 && !scaled)
        for (int64_t k = 0; k < count; ++k) to[k] = T(widen(from[k]));
    else if (stride == 1)
        for (int64_t k = 0; k < count; ++k) to[k] = T(double(widen(from[k])) * scale);
    else
        for (int64_t k = 0; k < count; ++k) to[k] = T(double(widen(from[k * stride])) * scale);
}

template <class T>
void read_row(const Matrix& matrix, int64_t row, double scale, double* to) {
    with_elements(matrix, [&](auto* elements) {
        read(elements + row * matrix.row_stride, matrix.col_stride, matrix.cols, scale, true, to);
    });
}

template <class T, class E>
void pack_elements(const E* elements, const Matrix& m, int64_t first, int64_t count, const double* row_scale,
                   const double* depth_scale, T* panels) {
    constexpr int P = LANES<T>;
    constexpr int64_t BLOCK = 64;
    T rows[P][BLOCK];
    for (int64_t i = 0; i < count; i += P, panels += P * m.cols) {
        const int valid = int(count - i < P ? count - i : P);
        const E* from = elements + (first + i) * m.row_stride;
        if (m.row_stride == 1 && valid == P && !row_scale) {  // the panel's rows are neighbours: no transposition
            for (int64_t k = 0; k < m.cols; ++k) {
                const double scale = depth_scale ? depth_scale[k] : 1;
                read(from + k * m.col_stride, 1, P, scale, depth_scale != nullptr, panels + k * P);
            }
            continue;
        }
        for (int l = valid; l < P; ++l)
            for (int64_t k = 0; k < BLOCK; ++k) rows[l][k] = 0;
        for (int64_t k = 0; k < m.cols; k += BLOCK) {
            const int64_t depth = m.cols - k < BLOCK ? m.cols - k : BLOCK;
            for (int l = 0; l < valid; ++l) {
                const double scale = row_scale ? row_scale[first + i + l] : 1;
                read(from + l * m.row_stride + k * m.col_stride, m.col_stride, depth, scale, row_scale != nullptr,
                     rows[l]);
            }
            if (depth_scale)
                for (int l = 0; l < valid; ++l)
                    for (int64_t e = 0; e < depth; ++e) rows[l][e] = T(double(rows[l][e]) * depth_scale[k + e]);
            transpose(rows[0], BLOCK, P, depth, panels + k * P, P);
        }
    }
}

template <class T>
void pack(const Matrix& matrix, int64_t first, int64_t count, const double* row_scale, const double* depth_scale,
          T* panels) {
    with_elements(
        matrix, [&](auto* elements) { pack_elements(elements, matrix, first, count, row_scale, depth_scale, panels); });
}

// c[STRIP, N * LANES] (+)= a strip of one panel times N panels, over `depth`. The accumulators stay in registers.
template <class T, int N>
INLINE void micro_product(const T* a, const T* b, int64_t panel_stride, int64_t depth, bool add, T* c) {
    constexpr int P = LANES<T>, R = STRIP<T>;
    Vector<T> sums[R][N] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector<T> columns[N];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) columns[v] = load(b + v * panel_stride + k * P);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Vector<T> row = broadcast(a[k * P + r]);
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) sums[r][v] += row * columns[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
            T* to = c + r * TILE + v * P;
            store(to, add ? load(to) + sums[r][v] : sums[r][v]);
        }
}

template <class T>
void tile_product(const T* a, const T* b, int64_t rows, int64_t cols, int64_t depth, bool upper, bool add, T* c) {
    constexpr int P = LANES<T>, R = STRIP<T>;
    const int64_t panel = P * depth, panels = (cols + P - 1) / P;
    int64_t k = 0;
    do {  // once even for depth 0, which gives zeros
        const int64_t block = depth - k < DEPTH_BLOCK ? depth - k : DEPTH_BLOCK;
        for (int64_t r = 0; r < rows; r += R) {
            const T* strip = a + r / P * panel + k * P + r % P;
            for (int64_t v = 0; v < panels; v += PANELS) {
                if (upper && (v + PANELS) * P <= r) continue;
                const T* columns = b + v * panel + k * P;
                T* to = c + r * TILE + v * P;
                switch (panels - v) {
                    case 1:
                        micro_product<T, 1>(strip, columns, panel, block, add || k > 0, to);
                        break;
                    case 2:
                        micro_product<T, 2>(strip, columns, panel, block, add || k > 0, to);
                        break;
                    default:
                        micro_product<T, PANELS>(strip, columns, panel, block, add || k > 0, to);
                }
            }
        }
        k += DEPTH_BLOCK;
    } while (k < depth);
}

template <class T, class E>
void store_rows(const T* c, T factor, E* to, const Matrix& out, const Matrix* addend, bool accumulate) {
    T row[TILE];
    for (int64_t i = 0; i < out.rows; ++i, c += TILE) {
        for (int64_t j = 0; j < out.cols; ++j) row[j] = factor * c[j];
        if (addend)
            with_elements(*addend, [&](auto* from) {
                from += i * addend->row_stride;
                for (int64_t j = 0; j < out.cols; ++j) row[j] += T(widen(from[j * addend->col_stride]));
            });
        E* at = to + i * out.row_stride;
        if (accumulate)
            for (int64_t j = 0; j < out.cols; ++j) row[j] += T(widen(at[j * out.col_stride]));
        if (out.col_stride == 1)
            for (int64_t j = 0; j < out.cols; ++j) at[j] = Round<E, T>::to(row[j]);
        else
            for (int64_t j = 0; j < out.cols; ++j) at[j * out.col_stride] = Round<E, T>::to(row[j]);
    }
}

template <class T>
void store_tile(const T* c, T factor, const Matrix& out, const Matrix* addend, bool accumulate) {
    with_elements(out, [&](auto* to) { store_rows(c, factor, to, out, addend, accumulate); });
}

}  // namespace
