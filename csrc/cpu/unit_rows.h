#pragma once

#include <cmath>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/riesz.h"

namespace sphere {

// Row data for the kernels, from the norms.
template <class T>
struct RowData {
    std::vector<double> norm, scale, deficit, upstream;
    std::vector<T> half_deficit, narrow_upstream;

    explicit RowData(int64_t n) : norm(size_t(n)), scale(size_t(n)), deficit(size_t(n)), half_deficit(size_t(n)) {}

    static RowData of(const Kernels<T>& kernels, const Matrix& weight, int threads) {
        RowData data(weight.rows);
        constexpr int64_t CHUNK = 64;
        parallel_for(ceil_div(weight.rows, CHUNK), threads, [&](int64_t c, int) {
            const int64_t first = c * CHUNK, count = std::min(CHUNK, weight.rows - first);
            kernels.norms(weight, first, count, data.norm.data() + first);
        });
        data.from_norms();
        return data;
    }

    // Of rows whose inner products are gram[n, n], of which the diagonal is read.
    static RowData of_gram(const T* gram, int64_t n, int64_t ld) {
        RowData data(n);
        for (int64_t i = 0; i < n; ++i) {
            const T diagonal = gram[i * ld + i];
            const double square = double(diagonal) + double(diagonal - diagonal);  // infinity becomes NaN
            data.norm[size_t(i)] = std::sqrt(square < 0 ? 0 : square);             // below zero is a rounding error
        }
        data.from_norms();
        for (size_t i = 0; i < size_t(n); ++i)  // what rounding left of a zero row's inner products is no direction
            if (data.norm[i] == 0) data.scale[i] = 0;
        return data;
    }

    void from_norms() {
        for (size_t i = 0; i < norm.size(); ++i) {
            const double length = norm[i] + EPSILON;
            // An overflowed norm must not turn a finite row into a plausible zero row.
            scale[i] = 1 / (length + (norm[i] - norm[i]));
            deficit[i] = deficit_of(norm[i]);
            half_deficit[i] = T(0.5 * deficit[i]);
        }
    }

    UnitRows<T> view(const Matrix* weight, bool own_scale = true) const {
        return {weight,
                own_scale,
                scale.data(),
                deficit.data(),
                half_deficit.data(),
                upstream.data(),
                narrow_upstream.data()};
    }
};

// Energies before `Kernels::energy` adds to them: every pair's baseline, and each row's pair with its own negative.
template <class T>
void start_energies(const RowData<T>& data, const Riesz& riesz, double* energies) {
    const double others = double(data.norm.size() - 1) * baseline(riesz);
    for (size_t i = 0; i < data.norm.size(); ++i) {
        const double own = data.norm[i] * 0;  // a lone NaN row has no pairs to poison
        energies[i] = own + others;
        if (riesz.half_space) energies[i] += riesz_value(antipode_square(data.norm[i], riesz.angular), riesz.s);
    }
}

}  // namespace sphere
