#include "cpu/gram.h"

#include <cmath>

#include "cpu/blocks.h"
#include "cpu/riesz.h"
#include "cpu/tiers.h"
#include "cpu/unit_rows.h"

namespace sphere {

template <class T>
void gram(const Matrix& weight, bool normalize, int tier, int threads, T* out) {
    const Kernels<T>& kernel = kernels<T>(tier);
    const int64_t n = weight.rows;
    threads = n * n * weight.cols < SMALL_WORK ? 1 : usable_threads(threads);
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
void gram_update_energy(T* gram, int64_t ld, const Matrix& left, const Matrix& right, const double* diagonal,
                        const Matrix* weight, const Riesz& riesz, int tier, int threads, double* energies) {
    const Kernels<T>& kernel = kernels<T>(tier);
    const int64_t n = left.rows;
    threads = n * n < SMALL_WORK / 16 ? 1 : usable_threads(threads);
    RowData<T> data(n);
    for (size_t i = 0; i < size_t(n); ++i) {
        const double square = diagonal[i] + (diagonal[i] - diagonal[i]);  // infinity becomes NaN
        data.norm[i] = std::sqrt(square < 0 ? 0 : square);                // below zero is a rounding error
    }
    data.from_norms();
    for (size_t i = 0; i < size_t(n); ++i)  // what rounding left of the inner products of a zero row is no direction
        if (data.norm[i] == 0) data.scale[i] = 0;
    start_energies(data, riesz, energies);
    const Blocking cut = blocking<T>(n, left.cols, GROUP_ROWS, false);
    TileSums sums(cut);
    const UnitRows<T> rows = data.view(weight, false);
    symmetric_product(
        kernel, left, right, nullptr, cut, threads,
        [&](const TileIndex& at, T* c, int64_t t) {
            const PairTile<T> tile{c, at.row, at.col, at.rows, at.cols};
            kernel.update(c, tile, rows.scale, gram, ld);
            mirror(gram, at, ld);
            kernel.energy(tile, rows, riesz, sums.rows(t), sums.cols(t));
        },
        [&](const std::vector<TileIndex>& tiles) { sums.add_to(energies, tiles); });
    for (int64_t i = 0; i < n; ++i) gram[i * ld + i] = T(diagonal[i]);
}

template void gram<float>(const Matrix&, bool, int, int, float*);
template void gram<double>(const Matrix&, bool, int, int, double*);
template void gram_update_energy<float>(float*, int64_t, const Matrix&, const Matrix&, const double*, const Matrix*,
                                        const Riesz&, int, int, double*);
template void gram_update_energy<double>(double*, int64_t, const Matrix&, const Matrix&, const double*, const Matrix*,
                                         const Riesz&, int, int, double*);

}  // namespace sphere
