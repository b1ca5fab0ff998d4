#include "cpu/pair_energy.h"

#include "cpu/blocks.h"
#include "cpu/near_pairs.h"
#include "cpu/product.h"
#include "cpu/riesz.h"
#include "cpu/tiers.h"
#include "cpu/unit_rows.h"
#include "cpu/views.h"

namespace sphere {

namespace {

// pull <- (x - u (unit . x)) / (|w| + eps) for x = pull + radial unit and u = w / |w|; zero for a zero row. All but
// 1e-8 of the radial part is lost in it, so that part stays a number per row and never rounds into the other.
template <class T>
void through_normalisation(const Kernels<T>& kernels, const Matrix& weight, const RowData<T>& data,
                           const std::vector<double>& radial, int threads, T* pull) {
    constexpr int64_t CHUNK = 16;
    const int64_t n = weight.rows, d = weight.cols;
    parallel_for(ceil_div(n, CHUNK), threads, [&](int64_t c, int) {
        std::vector<double> row(static_cast<size_t>(d));
        for (int64_t i = c * CHUNK; i < std::min(n, (c + 1) * CHUNK); ++i) {
            const double norm = data.norm[size_t(i)], length = norm + EPSILON;
            T* x = pull + i * d;
            if (norm == 0) {
                std::fill(x, x + d, T(0));
                continue;
            }
            kernels.row(weight, i, 1 / norm, row.data());
            double along = 0;
            for (size_t k = 0; k < row.size(); ++k) along += row[k] * double(x[k]);
            along = along * (norm / length) - radial[size_t(i)] * norm * EPSILON / (length * length);
            for (size_t k = 0; k < row.size(); ++k) x[k] = T((double(x[k]) - row[k] * along) / length);
        }
    });
}

}  // namespace

template <class T>
void pair_energy(const Matrix& weight, const Riesz& riesz, int tier, int threads, double* energies) {
    const Kernels<T>& kernel = kernels<T>(tier);
    threads = threads_for(weight.rows * weight.rows * weight.cols, threads);
    const auto data = RowData<T>::of(kernel, weight, threads);
    const UnitRows<T> rows = data.view(&weight);
    const Blocking cut = blocking<T>(weight.rows, weight.cols, GROUP_ROWS, true);
    TileSums sums(cut);
    start_energies(data, riesz, energies);
    symmetric_product(
        kernel, weight, weight, data.scale.data(), cut, threads,
        [&](const TileIndex& at, T* c, int64_t t) {
            kernel.energy({c, at.row, at.col, at.rows, at.cols}, rows, riesz, sums.rows(t), sums.cols(t));
        },
        [&](const std::vector<TileIndex>& tiles) { sums.add_to(energies, tiles); });
}

template <class T>
void pair_energy_backward(const double* upstream, const Matrix& weight, const Riesz& riesz, int tier, int threads,
                          T* gradient) {
    const Kernels<T>& kernel = kernels<T>(tier);
    const int64_t n = weight.rows, d = weight.cols;
    threads = threads_for(n * n * d, threads);
    auto data = RowData<T>::of(kernel, weight, threads);
    data.upstream.assign(upstream, upstream + n);
    data.narrow_upstream.assign(upstream, upstream + n);
    const UnitRows<T> rows = data.view(&weight);
    constexpr int64_t MOST_ROWS = sizeof(T) == 4 ? 1536 : 1152;  // a square of slopes of about 10 MB
    const Blocking cut = blocking<T>(n, d, MOST_ROWS, true);
    TileSums sums(cut);
    std::vector<double> radial(static_cast<size_t>(n));
    if (riesz.half_space)
        for (size_t i = 0; i < radial.size(); ++i) radial[i] = upstream[i] * antipode_slope(data.norm[i], riesz);

    T* pull = gradient;
    std::fill(pull, pull + n * d, T(0));
    const int64_t side = std::min(n, cut.group);
    Buffer<T> slopes(side * side);
    std::vector<NearPairList> near(static_cast<size_t>(cut.tiles()));
    const auto group_of = [&](int64_t row) { return row / cut.group * cut.group; };
    const auto rows_of = [&](int64_t group) { return std::min(n, group + cut.group) - group; };
    // out[rows of p] += s unit[rows of q]
    const auto pull_bulk = [&](int64_t p, int64_t q, const Matrix& s) {
        const Matrix others = transposed(part(weight, q, rows_of(q), 0, d));
        const Matrix out{pull + p * d, type_of<T>, rows_of(p), d, d, 1};
        product(kernel, {s}, {others, data.scale.data() + q}, 1, out, nullptr, true, threads);
    };
    symmetric_product(
        kernel, weight, weight, data.scale.data(), cut, threads,
        [&](const TileIndex& at, T* c, int64_t t) {
            const int64_t p = group_of(at.row), q = group_of(at.col), ld = rows_of(q);
            T* to = slopes.get() + (at.row - p) * ld + at.col - q;
            near[size_t(t)].pairs.clear();
            kernel.slopes({c, at.row, at.col, at.rows, at.cols}, rows, riesz, to, ld, sums.rows(t), sums.cols(t),
                          &near[size_t(t)]);
            if (p == q) mirror(slopes.get(), {at.row - p, at.col - p, at.rows, at.cols}, ld);
        },
        [&](const std::vector<TileIndex>& tiles) {
            const int64_t p = group_of(tiles.front().row), q = group_of(tiles.front().col);
            const Matrix s{slopes.get(), type_of<T>, rows_of(p), rows_of(q), rows_of(q), 1};
            sums.add_to(radial.data(), tiles);
            pull_bulk(p, q, s);
            if (p != q) pull_bulk(q, p, transposed(s));
            pull_near_pairs(near, int64_t(tiles.size()), weight, data, kernel, threads, pull);
        });
    through_normalisation(kernel, weight, data, radial, threads, pull);
}

template void pair_energy<float>(const Matrix&, const Riesz&, int, int, double*);
template void pair_energy<double>(const Matrix&, const Riesz&, int, int, double*);
template void pair_energy_backward<float>(const double*, const Matrix&, const Riesz&, int, int, float*);
template void pair_energy_backward<double>(const double*, const Matrix&, const Riesz&, int, int, double*);

}  // namespace sphere
