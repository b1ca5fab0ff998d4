#include "cpu/product.h"

#include "cpu/views.h"

namespace sphere {

namespace {

// Rows of an operand to pack at a time.
template <class T>
int64_t chunk_rows(int64_t rows, int64_t depth) {
    const int64_t most = PANEL_BYTES / 2 / (std::max<int64_t>(1, depth) * int64_t(sizeof(T))) / TILE * TILE;
    return std::min(rows, std::max(TILE, most));
}

}  // namespace

template <class T>
void product(const Kernels<T>& kernels, const Operand& a, const Operand& b, double factor, const Matrix& out,
             const Matrix* addend, bool accumulate, int threads) {
    if (out.rows == 0 || out.cols == 0) return;
    if (out.row_stride == 1 && out.col_stride != 1) {  // written along its columns: compute the transpose
        const Matrix turned = addend ? transposed(*addend) : Matrix{};
        return product(kernels, b, a, factor, transposed(out), addend ? &turned : nullptr, accumulate, threads);
    }
    const int64_t depth = a.matrix.cols;
    const int64_t row_chunk = chunk_rows<T>(out.rows, depth), col_chunk = chunk_rows<T>(out.cols, depth);
    // Tiles of at most TILE, equal in size and enough of them to share.
    const auto side = [&](int64_t rows) { return rows <= TILE * threads ? TILE / 2 : TILE; };
    const int64_t row_tile = side(row_chunk), col_tile = side(col_chunk);
    Panels<T> left(kernels, row_chunk, depth), right(kernels, col_chunk, depth);
    const int64_t product_size = round_up(std::min(row_tile, out.rows), kernels.lanes) * TILE;
    Buffer<T> products(threads * product_size);
    for (int64_t p = 0; p < out.rows; p += row_chunk) {
        const int64_t rows = std::min(row_chunk, out.rows - p), row_tiles = ceil_div(rows, row_tile);
        left.pack(a.matrix, p, rows, nullptr, a.depth_scale, row_tile, threads);
        for (int64_t q = 0; q < out.cols; q += col_chunk) {
            const int64_t cols = std::min(col_chunk, out.cols - q), col_tiles = ceil_div(cols, col_tile);
            right.pack(b.matrix, q, cols, nullptr, b.depth_scale, col_tile, threads);
            parallel_for(row_tiles * col_tiles, threads, [&](int64_t t, int worker) {
                const int64_t i = p + t / col_tiles * row_tile, j = q + t % col_tiles * col_tile;
                const int64_t tall = std::min(row_tile, p + rows - i), wide = std::min(col_tile, q + cols - j);
                T* c = products.get() + worker * product_size;
                kernels.product(left.at(i), right.at(j), tall, wide, depth, false, false, c);
                const Matrix to = part(out, i, tall, j, wide);
                const Matrix from = addend ? part(*addend, i, tall, j, wide) : Matrix{};
                kernels.store(c, T(factor), to, addend ? &from : nullptr, accumulate);
            });
        }
    }
}

#define INSTANTIATE(T)                                                                                                \
    template void product<T>(const Kernels<T>&, const Operand&, const Operand&, double, const Matrix&, const Matrix*, \
                             bool, int);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace sphere
