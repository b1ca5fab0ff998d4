#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "cpu/views.h"

namespace sphere {

constexpr int64_t PANEL_BYTES = 20 << 20;  // packed rows at a time: what an operation's extra memory mostly is
constexpr int64_t GROUP_ROWS = 6144;       // bounds the sums that a group of tiles keeps
constexpr int64_t SMALL_WORK = 1 << 18;    // multiplications below which waking a thread costs more than it saves

inline int threads_for(int64_t work, int threads) { return work < SMALL_WORK ? 1 : threads; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How a product is cut: rows into tiles, tiles into groups that are packed together, and the depth into blocks where
// the rows are too long for a group of their whole length. It depends on the shape alone, and so does the order of
// every sum.
struct Blocking {
    int64_t tile, group, depth;

    // Room for the tiles of a group, in elements of each and in their number.
    int64_t tile_size() const { return tile * TILE; }
    int64_t tiles() const { return (group / tile) * (group / tile); }
};

template <class T>
Blocking blocking(int64_t n, int64_t depth, int64_t most_rows, bool one_operand) {
    constexpr int64_t CUT_ROWS = sizeof(T) == 4 ? 1152 : 768;  // of a group whose depth is cut: all its tiles are kept
    const int64_t row_bytes = std::max<int64_t>(1, depth) * int64_t(sizeof(T));
    const int64_t tile = n <= 1024 ? TILE / 2 : TILE;  // smaller for few rows, so that threads share them evenly
    if (n <= most_rows && n * row_bytes * (one_operand ? 1 : 2) <= PANEL_BYTES) return {tile, round_up(n, tile), depth};
    const int64_t whole = std::min(most_rows, PANEL_BYTES / 2 / row_bytes);
    const int64_t most = std::max(whole, std::min(most_rows, CUT_ROWS)) / tile * tile;
    const int64_t group = round_up(ceil_div(n, ceil_div(n, most)), tile);
    if (most <= whole) return {tile, group, depth};
    return {tile, group, std::min(depth, PANEL_BYTES / 2 / (group * int64_t(sizeof(T))) / 256 * 256)};
}

// A pair of tiles' rows and columns.
struct TileIndex {
    int64_t row, col, rows, cols;
};

// The tiles, on and above the diagonal, of the group of rows from p on and columns from q on.
inline std::vector<TileIndex> tiles_of(int64_t n, const Blocking& cut, int64_t p, int64_t q) {
    std::vector<TileIndex> tiles;
    const int64_t p_end = std::min(n, p + cut.group), q_end = std::min(n, q + cut.group);
    for (int64_t i = p; i < p_end; i += cut.tile)
        for (int64_t j = std::max(i, q); j < q_end; j += cut.tile)
            tiles.push_back({i, j, std::min(cut.tile, p_end - i), std::min(cut.tile, q_end - j)});
    return tiles;
}

// matrix[j, i] = matrix[i, j] for the pairs i < j of a tile.
template <class T>
void mirror(T* matrix, const TileIndex& at, int64_t ld) {
    constexpr int64_t BLOCK = 16;  // what a block writes stays in the first cache
    for (int64_t r = at.row; r < at.row + at.rows; r += BLOCK)
        for (int64_t c = at.col; c < at.col + at.cols; c += BLOCK) {
            const int64_t rows = std::min(BLOCK, at.row + at.rows - r), cols = std::min(BLOCK, at.col + at.cols - c);
            if (c >= r + rows) {
                transpose(matrix + r * ld + c, ld, rows, cols, matrix + c * ld + r, ld);
                continue;
            }
            for (int64_t j = c; j < c + cols; ++j)
                for (int64_t i = r; i < std::min(r + rows, j); ++i) matrix[j * ld + i] = matrix[i * ld + j];
        }
}

// Rows `first .. first + count` of a matrix as panels.
template <class T>
class Panels {
  public:
    // Room for so many rows of so many columns.
    Panels(const Kernels<T>& kernels, int64_t rows, int64_t depth)
        : kernels_(kernels), data_(round_up(rows, kernels.lanes) * depth) {}

    void pack(const Matrix& matrix, int64_t first, int64_t count, const double* row_scale, const double* depth_scale,
              int64_t tile, int threads) {
        first_ = first, depth_ = matrix.cols;
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
    int64_t first_ = 0, depth_ = 0;
    Buffer<T> data_;
};

// Tiles of a b^T on and above the diagonal, rows of a and b times `scale`. Within a group of rows on_tile(tile, c,
// index) runs in parallel, after_group(tiles) when all of it is done.
template <class T, class OnTile, class AfterGroup>
void symmetric_product(const Kernels<T>& kernels, const Matrix& a, const Matrix& b, const double* scale,
                       const Blocking& cut, int threads, OnTile on_tile, AfterGroup after_group) {
    const int64_t n = a.rows, rows = std::min(n, cut.group);
    const bool same = a.data == b.data, whole = cut.depth >= a.cols;
    Panels<T> left(kernels, rows, cut.depth), other(kernels, same && cut.group >= n ? 0 : rows, cut.depth);
    // A tile is finished at once where the depth is whole; else all tiles of a group wait for the last of its blocks.
    const int64_t tile_size = std::min(cut.tile_size(), round_up(rows, kernels.lanes) * TILE);
    Buffer<T> products((whole ? threads : cut.tiles()) * tile_size);
    for (int64_t p = 0; p < n; p += cut.group)
        for (int64_t q = p; q < n; q += cut.group) {
            const int64_t p_end = std::min(n, p + cut.group), q_end = std::min(n, q + cut.group);
            const auto tiles = tiles_of(n, cut, p, q);
            int64_t k = 0;
            do {  // once even for depth 0, which gives zeros
                const int64_t depth = std::min(cut.depth, a.cols - k);
                const Panels<T>& right = same && q == p ? left : other;
                if (q == p || !whole)
                    left.pack(part(a, 0, n, k, depth), p, p_end - p, scale, nullptr, cut.tile, threads);
                if (&right == &other)
                    other.pack(part(b, 0, n, k, depth), q, q_end - q, scale, nullptr, cut.tile, threads);
                parallel_for(int64_t(tiles.size()), threads, [&](int64_t t, int worker) {
                    const TileIndex& at = tiles[size_t(t)];
                    T* c = products.get() + (whole ? worker : t) * tile_size;
                    kernels.product(left.at(at.row), right.at(at.col), at.rows, at.cols, depth, at.row == at.col, k > 0,
                                    c);
                    if (k + depth == a.cols) on_tile(at, c, t);
                });
                k += depth;
            } while (k < a.cols);
            after_group(tiles);
        }
}

// Sums over the rows and over the columns of each tile of a group, added up in the order of the tiles.
class TileSums {
  public:
    double* rows(int64_t tile) { return sums_.data() + 2 * TILE * tile; }
    double* cols(int64_t tile) { return rows(tile) + TILE; }

    explicit TileSums(const Blocking& cut) : sums_(size_t(2 * TILE * cut.tiles())) {}

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
