#pragma once

#include "cuda/elements.cuh"
#include "cuda/pairs.cuh"

// Rows that met near pairs in a tile get their sum over that tile's columns anew, from differences of rows in fp64; and
// the sums over tiles.
namespace sphere::cuda {

constexpr int SUM_THREADS = 128;

// |w| + eps of a row, by a warp; NaN where it overflows.
__device__ inline double length_of(const Matrix& weight, int64_t row) {
    double square = 0;
    for (int64_t k = threadIdx.x % 32; k < weight.cols; k += 32) {
        const double x = element(weight.data, weight.type, row * weight.row_stride + k * weight.col_stride);
        square += x * x;
    }
    return finite_or_nan(sqrt(warp_sum(square))) + EPSILON;
}

// The energy of one pair, by a warp: its squares from the rows of the weight (null data: none), from their inner
// products in gram (null data: none) where those are not near, or from these alone.
__device__ inline double exact_value(const Matrix& weight, double length_i, const Matrix& gram, const RowData& data,
                                     const Riesz& riesz, int64_t before, int64_t i, int64_t j) {
    double deficit = data.deficit[before + i] + data.deficit[before + j], minus = 0, plus = 0;
    if (weight.data) {
        const double length_j = length_of(weight, j);
        for (int64_t k = threadIdx.x % 32; k < weight.cols; k += 32) {
            const int64_t along = k * weight.col_stride;
            const double a = element(weight.data, weight.type, i * weight.row_stride + along) / length_i;
            const double b = element(weight.data, weight.type, j * weight.row_stride + along) / length_j;
            minus += (a - b) * (a - b);
            plus += (a + b) * (a + b);
        }
        minus = warp_sum(minus);
        plus = warp_sum(plus);
    }
    if (gram.data) {
        const double m = element(gram.data, gram.type, i * gram.row_stride + j * gram.col_stride);
        const double twice = 2 * finite_or_nan(m) * data.scale[before + i] * data.scale[before + j];
        const double far_minus = (2 - twice) - deficit, far_plus = (2 + twice) - deficit;
        const double near = riesz.angular ? NEAR - deficit : NEAR;  // in terms of angles, lengths are 1
        if (!weight.data || !(far_minus < near)) minus = far_minus;
        if (!weight.data || !(far_plus < near)) plus = far_plus;
    }
    return pair_value(minus, plus, deficit, riesz);
}

// The infinite ones among the sums of tiles; baseline: what the tiles took for a pair's unit, or 0. Weight or gram may
// have no data.
__global__ void __launch_bounds__(SUM_THREADS, 1)
    near_energy_kernel(Batch weight, Batch gram, RowData data, int64_t count, int64_t n, int64_t tiles, int64_t side,
                       Riesz riesz, double baseline,
                       double* partial) {  // [count, tiles, n]
    const int64_t place = block_index() * SUM_THREADS + threadIdx.x, first = place - threadIdx.x % 32;
    const bool here = place < count * tiles * n;
    const unsigned met = __ballot_sync(ALL_LANES, here && partial[here ? place : 0] == infinity());
    for (int lane = 0; lane < 32; ++lane) {
        if (!(met >> lane & 1)) continue;  // the whole warp
        const int64_t entry = first + lane, i = entry % n, tile = entry / n % tiles, m = entry / (n * tiles);
        const Matrix rows = weight[m], products = gram[m];
        const double length = rows.data ? length_of(rows, i) : 0;
        double sum = 0;
        for (int64_t j = tile * side; j < n && j < (tile + 1) * side; ++j) {
            if (i == j) continue;
            const double value = exact_value(rows, length, products, data, riesz, m * n, i, j);
            sum += baseline == 0 ? value : value / baseline - 1;
        }
        if (int(threadIdx.x % 32) == lane) partial[entry] = sum;
    }
}

// Energy of every row: its sums over the tiles, one after the other, and the row with its own negative.
__global__ void __launch_bounds__(SUM_THREADS)
    energy_sum_kernel(const double* partial,  // [count, tiles, n]
                      RowData data, int64_t count, int64_t n, int64_t tiles, Riesz riesz, double baseline,
                      double* energies) {  // [count, n]
    const int64_t place = block_index() * SUM_THREADS + threadIdx.x;
    if (place >= count * n) return;
    double sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += partial[(place / n * tiles + t) * n + place % n];
    if (baseline != 0) sum = (sum + double(n - 1)) * baseline;
    const double norm = data.norm[place];
    if (riesz.half_space) sum += riesz_value(antipode_square(norm, riesz.angular), riesz.s);
    energies[place] = sum + 0 * norm;  // a lone NaN row has no pairs to poison
}

}  // namespace sphere::cuda
