#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sphere {

constexpr int64_t PANEL_BYTES = 20 << 20;  // packed rows at a time: what an operation's extra memory mostly is
constexpr int64_t GROUP_ROWS = 6144;       // bounds the sums that a group of tiles keeps
constexpr int64_t SMALL_WORK = 1 << 18;    // multiplications below which waking a thread costs more than it saves

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How rows are cut: into tiles, and tiles into groups that are packed together. It depends on the shape alone, and so
// does the order of every sum.
struct Blocking {
    int64_t tile, group;
};

// Tiles are smaller for few rows, so that threads share them evenly, and for very long ones, to bound memory.
template <class T>
Blocking blocking(int64_t n, int64_t depth, int64_t most_rows, bool one_operand) {
    const int64_t row_bytes = std::max<int64_t>(1, depth) * int64_t(sizeof(T));
    int64_t tile = n <= 1024 ? TILE / 2 : TILE;
    while (tile > TILE / 4 && 2 * tile * row_bytes > PANEL_BYTES) tile /= 2;
    if (n <= most_rows && n * row_bytes * (one_operand ? 1 : 2) <= PANEL_BYTES) return {tile, round_up(n, tile)};
    const int64_t most = std::max(tile, std::min(most_rows, PANEL_BYTES / 2 / row_bytes) / tile * tile);
    return {tile, round_up(ceil_div(n, ceil_div(n, most)), tile)};
}

// A pair of tiles' rows and columns.
struct TileIndex {
    int64_t row, col, rows, cols;
};

// matrix[j, i] = matrix[i, j] for the pairs i < j of a tile.
template <class T>
void mirror(T* matrix, const TileIndex& at, int64_t ld) {
    constexpr int64_t BLOCK = 16;  // what a block writes stays in the first cache
    for (int64_t r = at.row; r < at.row + at.rows; r += BLOCK)
        for (int64_t c = at.col; c < at.col + at.cols; c += BLOCK)
            for (int64_t j = c; j < std::min(at.col + at.cols, c + BLOCK); ++j)
                for (int64_t i = r; i < std::min({at.row + at.rows, r + BLOCK, j}); ++i)
                    matrix[j * ld + i] = matrix[i * ld + j];
}

// Rows `first .. first + count` of a matrix as panels.
template <class T>
class Panels {
  public:
    Panels(const Kernels<T>& kernels, int64_t rows, int64_t depth)
        : kernels_(kernels), depth_(depth), data_(round_up(rows, kernels.lanes) * depth) {}

    void pack(const Matrix& matrix, int64_t first, int64_t count, const double* row_scale, const double* depth_scale,
              int64_t tile, int threads) {
        first_ = first;
        parallel_for(ceil_div(count, tile), threads, [&](int64_t t, int) {
            const int64_t row = t * tile;
            kernels_.pack(matrix, first + row, std::min(tile, count - row), row_scale, depth_scale,
                          data_.get() + row * depth_);
        });
    }

    // The panel that begins with a row; tiles begin at multiples of `lanes`.
    const T* at(int64_t row) const { return data_.get() + (row - first_) * depth_; }

  private:
    const Kernels<T>& kernels_;
    int64_t depth_, first_ = 0;
    Buffer<T> data_;
};

// Tiles of a b^T on and above the diagonal, rows of a and b times `scale`. Groups of rows are packed at a time; within
// a group on_tile(tile, c, index) runs in parallel, after_group(tiles) when all of it is done.
template <class T, class OnTile, class AfterGroup>
void symmetric_product(const Kernels<T>& kernels, const Matrix& a, const Matrix& b, const double* scale,
                       Blocking blocking, int threads, OnTile on_tile, AfterGroup after_group) {
    const int64_t n = a.rows, depth = a.cols;
    const auto [tile, group] = blocking;
    const bool same = a.data == b.data;
    Panels<T> left(kernels, std::min(n, group), depth),
        other(kernels, same && group >= n ? 0 : std::min(n, group), depth);
    const int64_t product_size = round_up(std::min(tile, n), kernels.lanes) * TILE;
    Buffer<T> products(threads * product_size);
    std::vector<TileIndex> tiles;
    for (int64_t p = 0; p < n; p += group) {
        const int64_t p_end = std::min(n, p + group);
        left.pack(a, p, p_end - p, scale, nullptr, tile, threads);
        for (int64_t q = p; q < n; q += group) {
            const int64_t q_end = std::min(n, q + group);
            const Panels<T>& right = same && q == p ? left : other;
            if (&right == &other) other.pack(b, q, q_end - q, scale, nullptr, tile, threads);
            tiles.clear();
            for (int64_t i = p; i < p_end; i += tile)
                for (int64_t j = std::max(i, q); j < q_end; j += tile)
                    tiles.push_back({i, j, std::min(tile, p_end - i), std::min(tile, q_end - j)});
            parallel_for(int64_t(tiles.size()), threads, [&](int64_t t, int worker) {
                const TileIndex& at = tiles[size_t(t)];
                T* c = products.get() + worker * product_size;
                kernels.product(left.at(at.row), right.at(at.col), at.rows, at.cols, depth, at.row == at.col, c);
                on_tile(at, c, t);
            });
            after_group(tiles);
        }
    }
}

// Sums over the rows and over the columns of each tile of a group, added up in the order of the tiles.
class TileSums {
  public:
    double* rows(int64_t tile) { return sums_.data() + 2 * TILE * tile; }
    double* cols(int64_t tile) { return rows(tile) + TILE; }

    explicit TileSums(Blocking blocking) {
        const int64_t side = blocking.group / blocking.tile;
        sums_.resize(size_t(2 * TILE * side * side));
    }

    void add_to(double* totals, const std::vector<TileIndex>& tiles) {
        for (size_t t = 0; t < tiles.size(); ++t) {
            const double *row = rows(int64_t(t)), *col = cols(int64_t(t));
            for (int64_t i = 0; i < tiles[t].rows; ++i) totals[tiles[t].row + i] += row[i];
            for (int64_t j = 0; j < tiles[t].cols; ++j) totals[tiles[t].col + j] += col[j];
        }
    }

  private:
    std::vector<double> sums_;
};

}  // namespace sphere
