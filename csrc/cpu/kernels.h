#pragma once

#include <cstdint>

#include "common/matrix.h"

namespace sphere {

constexpr int64_t TILE = 192;  // rows and columns of the largest tile: a multiple of every tier's micro-tile

// Unit rows of a weight, without storing them. A null weight: only inner products are known.
template <class T>
struct UnitRows {
    const Matrix* weight;
    bool own_scale;            // the scales are those of the weight's rows; if not, near pairs are scaled anew
    const double* scale;       // [n] 1 / (|w| + EPSILON); NaN where the norm overflows
    const double* deficit;     // [n] 1 - |unit row|^2
    const T* half_deficit;     // [n] half of it
    const double* upstream;    // [n] gradient of the energy of each row, in the backward pass
    const T* narrow_upstream;  // [n] the same
};

// Inner products of the unit rows first_row.. and first_col..; only pairs row < col count.
template <class T>
struct PairTile {
    const T* gram;  // [rows, TILE]
    int64_t first_row, first_col, rows, cols;
};

// A pair whose slope belongs to the difference sign unit_col - unit_row, see `slopes`.
struct NearPair {
    int64_t row, col;
    int sign;
    double slope;
};

// Sink for the near pairs that `slopes` finds.
struct NearPairs {
    void (*add)(NearPairs* self, const NearPair& pair);
};

// The functions that are compiled once per instruction set. `Panels` are rows packed for the micro-kernel: groups of
// `lanes` rows, depth-major within a group, so that one layout serves as both operands of a product.
template <class T>
struct Kernels {
    int lanes;

    // norms[i] of the rows first + i, in fp64.
    void (*norms)(const Matrix& matrix, int64_t first, int64_t count, double* norms);

    // A row of `matrix` times `scale`, in fp64.
    void (*row)(const Matrix& matrix, int64_t row, double scale, double* to);

    // Rows first.. of `matrix` as panels, times row_scale[row] and depth_scale[column] where given; the last panel is
    // filled with zeros. Scales are applied in fp64, and the product is rounded once.
    void (*pack)(const Matrix& matrix, int64_t first, int64_t count, const double* row_scale, const double* depth_scale,
                 T* panels);

    // c[rows, TILE] = (add ? c : 0) + a b^T over the depth; `upper` leaves out what lies below the diagonal of a square
    // tile.
    void (*product)(const T* a, const T* b, int64_t rows, int64_t cols, int64_t depth, bool upper, bool add, T* c);

    // out[i, j] = (accumulate ? out[i, j] : 0) + addend[i, j] + factor c[i, j], rounded once to the type of out.
    void (*store)(const T* c, T factor, const Matrix& out, const Matrix* addend, bool accumulate);

    // Sums over each row and each column of the tile of the energies of the pairs, each less `baseline` (riesz.h): what
    // is left is small, and so is its rounding.
    void (*energy)(const PairTile<T>& tile, const UnitRows<T>& rows, const Riesz& riesz, double* row_sums,
                   double* col_sums);

    // The derivative in unit row i of the upstream energies is  sum_j slopes_ij unit_j + radial_i unit_i,  plus, for
    // each near pair,  slope (sign unit_j - unit_i). Writes slopes [rows, ld] (zero for row >= col), sums of `radial`.
    void (*slopes)(const PairTile<T>& tile, const UnitRows<T>& rows, const Riesz& riesz, T* slopes, int64_t ld,
                   double* row_sums, double* col_sums, NearPairs* near);

    // c = inner products of the unit rows, from those of the rows in gram; on the pairs row < col.
    void (*cosines)(const T* gram, int64_t ld, const PairTile<T>& tile, const double* scale, T* c);

    // gram += c on the pairs row < col, where c becomes the inner products of the unit rows.
    void (*update)(T* c, const PairTile<T>& tile, const double* scale, T* gram, int64_t ld);
};

}  // namespace sphere
