#pragma once

#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/pairs.cuh"

// Rows made ready for products, and what is known of them.
namespace sphere::cuda {

constexpr int ROW_THREADS = 256;  // a warp for each row

// The power of two that brings a norm into [2^shift, 2^(shift + 1)); a finite one for any norm.
__device__ inline double power_of_two(double norm, int shift) {
    int64_t bits;
    memcpy(&bits, &norm, sizeof bits);
    int64_t exponent = bits >> 52 & 0x7ff;
    exponent = exponent < shift ? shift : exponent > 2045 + shift ? 2045 + shift : exponent;
    bits = (2046 + shift - exponent) << 52;
    memcpy(&norm, &bits, sizeof bits);
    return norm;
}

__device__ inline void store_row(const RowData& data, int64_t place, double norm, double factor) {
    data.norm[place] = norm;
    data.deficit[place] = deficit_of(norm);
    // An overflowed norm must not turn a finite row into a plausible zero row.
    data.scale[place] = 1 / (factor * (norm + EPSILON + (norm - norm)));
}

// Rows side by side, zero up to `width`; where `normalize`, times the power of two that makes their norm near 2^shift.
// That is exact, spares the products both overflow and the rounding of unit rows, and leaves 16-bit rows 16 bits wide.
// What fp16 loses to its smallest number at a norm of 256 is below fp32's rounding.
template <class T>
__global__ void __launch_bounds__(ROW_THREADS)
    rows_pack_kernel(Batch weight, bool normalize, bool round_to_tf32, int64_t width,
                     T* packed,       // [count, rows, width]
                     RowData data) {  // of count * rows; without `normalize` anything
    constexpr int SHIFT = std::is_same_v<T, __half> ? 8 : 0;
    const int lane = threadIdx.x % 32;
    const int64_t place = block_index() * (ROW_THREADS / 32) + threadIdx.x / 32, n = weight.first.rows;
    if (place >= weight.count * n) return;  // the whole warp
    const int64_t d = weight.first.cols, step = weight.first.col_stride;
    const T* row =
        static_cast<const T*>(weight.first.data) + place / n * weight.stride + place % n * weight.first.row_stride;
    double factor = 1;
    if (normalize) {
        double square = 0;
        for (int64_t k = lane; k < d; k += 32) {
            const double x = widened(row[k * step]);
            square += x * x;
        }
        const double norm = sqrt(warp_sum(square));
        factor = power_of_two(norm, SHIFT);
        if (lane == 0) store_row(data, place, norm, factor);
    }
    for (int64_t k = lane; k < width; k += 32) {
        T x{};
        if (k < d) x = row[k * step];
        if (normalize) narrow(widened(x) * factor, x);
        if constexpr (std::is_same_v<T, float>)
            if (round_to_tf32) x = __uint_as_float(to_tf32(x));
        packed[place * width + k] = x;
    }
}

// Row data from the diagonal of the rows' inner products.
template <class T>
__global__ void __launch_bounds__(ROW_THREADS) diagonal_rows_kernel(const T* diagonal, int64_t count, RowData data) {
    const int64_t place = block_index() * ROW_THREADS + threadIdx.x;
    if (place >= count) return;
    const double square = finite_or_nan(double(diagonal[place]));
    const double norm = square < 0 ? 0.0 : sqrt(square);
    store_row(data, place, norm, 1);
    if (norm == 0) data.scale[place] = 0;  // what rounding left of the inner products of a zero row is no direction
}

}  // namespace sphere::cuda
