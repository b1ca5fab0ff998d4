#include "cpu/gram.h"

#include "cpu/blocks.h"
#include "cpu/product.h"
#include "cpu/riesz.h"
#include "cpu/tiers.h"
#include "cpu/unit_rows.h"
#include "cpu/views.h"

namespace sphere {

template <class T>
void gram(const Matrix& weight, bool normalize, int tier, int threads, T* out) {
    const Kernels<T>& kernel = kernels<T>(tier);
    const int64_t n = weight.rows;
    threads = threads_for(n * n * weight.cols, threads);
    const auto data = normalize ? RowData<T>::of(kernel, weight, threads) : RowData<T>(0);
    symmetric_product(
        kernel, weight, weight, normalize ? data.scale.data() : nullptr, blocking<T>(n, weight.cols, GROUP_ROWS, true),
        threads,
        [&](const TileIndex& at, const T* c, int64_t) {
            for (int64_t i = 0; i < at.rows; ++i)
                for (int64_t j = at.row == at.col ? i : 0; j < at.cols; ++j)
                    out[(at.row + i) * n + at.col + j] = c[i * TILE + j];
            mirror(out, at, n);
        },
        [](const std::vector<TileIndex>&) {});
}

template <class T>
void subtract_gram(const Matrix& from, const Matrix& factor, int tier, int threads) {
    const int64_t n = from.rows, ld = from.row_stride;
    threads = threads_for(n * n * factor.cols, threads);
    T* const elements = static_cast<T*>(from.data);
    symmetric_product(
        kernels<T>(tier), factor, factor, nullptr, blocking<T>(n, factor.cols, GROUP_ROWS, true), threads,
        [&](const TileIndex& at, const T* c, int64_t) {
            for (int64_t i = 0; i < at.rows; ++i)
                for (int64_t j = at.row == at.col ? i : 0; j < at.cols; ++j)
                    elements[(at.row + i) * ld + at.col + j] -= c[i * TILE + j];
            mirror(elements, at, ld);
        },
        [](const std::vector<TileIndex>&) {});
}

template <class T>
void gram_energy(const Matrix& gram, const Matrix* weight, const Riesz& riesz, int tier, int threads,
                 double* energies) {
    const Kernels<T>& kernel = kernels<T>(tier);
    const int64_t n = gram.rows, ld = gram.row_stride;
    threads = threads_for(16 * n * n, threads);
    const T* const elements = static_cast<const T*>(gram.data);
    const auto data = RowData<T>::of_gram(elements, n, ld);
    start_energies(data, riesz, energies);
    const Blocking cut = blocking<T>(n, 0, GROUP_ROWS, false);
    TileSums sums(cut);
    const UnitRows<T> rows = data.view(weight, false);
    Buffer<T> cosines(threads * cut.tile_size());
    for (int64_t p = 0; p < n; p += cut.group)
        for (int64_t q = p; q < n; q += cut.group) {
            const auto tiles = tiles_of(n, cut, p, q);
            parallel_for(int64_t(tiles.size()), threads, [&](int64_t t, int worker) {
                const TileIndex& at = tiles[size_t(t)];
                T* c = cosines.get() + worker * cut.tile_size();
                const PairTile<T> tile{c, at.row, at.col, at.rows, at.cols};
                kernel.cosines(elements, ld, tile, rows.scale, c);
                kernel.energy(tile, rows, riesz, sums.rows(t), sums.cols(t));
            });
            sums.add_to(energies, tiles);
        }
}

template <class T>
void gram_update_energy(const Matrix& gram, const Matrix& left, const Matrix& cross, const Matrix& inner,
                        const Matrix* weight, const Riesz& riesz, int tier, int threads, double* energies) {
    const Kernels<T>& kernel = kernels<T>(tier);
    const int64_t n = gram.rows, b = left.cols, ld = gram.row_stride;
    threads = threads_for(16 * n * n, threads);
    T* const elements = static_cast<T*>(gram.data);

    // Z R^T + R Z^T + R (X X^T) R^T = [C, R] [R, C]^T with C = Z + R (X X^T) / 2. The error of the diagonal enters
    // every pair of its row: it is computed in fp64 and rounded once.
    Buffer<double> half(n * b);
    const Matrix c_matrix{half.get(), Type::float64, n, b, b, 1};
    product(kernels<double>(tier), {left}, {transposed(inner)}, 0.5, c_matrix, &cross, false, threads);
    Buffer<T> first(n * 2 * b), second(n * 2 * b);
    constexpr int64_t CHUNK = 64;
    parallel_for(ceil_div(n, CHUNK), threads, [&](int64_t chunk, int) {
        std::vector<double> row(static_cast<size_t>(b));
        for (int64_t i = chunk * CHUNK; i < std::min(n, (chunk + 1) * CHUNK); ++i) {
            kernel.row(left, i, 1, row.data());
            double change = 0;
            for (int64_t k = 0; k < b; ++k) {
                const double own = half[i * b + k], other = row[size_t(k)];
                change += own * other;
                first[i * 2 * b + k] = second[i * 2 * b + b + k] = T(own);
                first[i * 2 * b + b + k] = second[i * 2 * b + k] = T(other);
            }
            T& diagonal = elements[i * ld + i];
            diagonal = T(double(diagonal) + 2 * change);
        }
    });
    const auto data = RowData<T>::of_gram(elements, n, ld);
    start_energies(data, riesz, energies);
    const Blocking cut = blocking<T>(n, 2 * b, GROUP_ROWS, false);
    TileSums sums(cut);
    const UnitRows<T> rows = data.view(weight, false);
    const Matrix a{first.get(), type_of<T>, n, 2 * b, 2 * b, 1}, other{second.get(), type_of<T>, n, 2 * b, 2 * b, 1};
    symmetric_product(
        kernel, a, other, nullptr, cut, threads,
        [&](const TileIndex& at, T* c, int64_t t) {
            const PairTile<T> tile{c, at.row, at.col, at.rows, at.cols};
            kernel.update(c, tile, rows.scale, elements, ld);
            mirror(elements, at, ld);
            kernel.energy(tile, rows, riesz, sums.rows(t), sums.cols(t));
        },
        [&](const std::vector<TileIndex>& tiles) { sums.add_to(energies, tiles); });
}

template void gram<float>(const Matrix&, bool, int, int, float*);
template void gram<double>(const Matrix&, bool, int, int, double*);
template void subtract_gram<float>(const Matrix&, const Matrix&, int, int);
template void subtract_gram<double>(const Matrix&, const Matrix&, int, int);
template void gram_energy<float>(const Matrix&, const Matrix*, const Riesz&, int, int, double*);
template void gram_energy<double>(const Matrix&, const Matrix*, const Riesz&, int, int, double*);
template void gram_update_energy<float>(const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix*,
                                        const Riesz&, int, int, double*);
template void gram_update_energy<double>(const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix*,
                                         const Riesz&, int, int, double*);

}  // namespace sphere
